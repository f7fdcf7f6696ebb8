"""Training that begins with the weights of a folder: all of them, at every precision and stage, or one error that names it all."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ngpt import build
from ngpt.config.compose import compose_run
from ngpt.config.llama_folder import llama_config
from ngpt.config.problems import ConfigError
from ngpt.dist.process_group import choose_device
from ngpt.dist.ranks import Ranks
from ngpt.initial_weights import begin_with
from ngpt.trained import find_source


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """The small run's weights, moved away from what its seed draws."""
    path = tmp_path_factory.mktemp("llama")
    source = find_source(small_run.folder)
    (path / "config.json").write_text(json.dumps(llama_config(source.config, dtype="float32", token_ids={})))
    save_file({name: source.weights.read(name) + 0.001 for name in source.weights.names}, path / "model.safetensors")
    return path


@pytest.fixture
def config(small_run):
    return compose_run(small_run.overrides)


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "natural_galore"), ("bf16_master", "galore"), ("bf16", "lora")]
)
def test_an_engine_begins_with_the_weights_of_the_folder(small_run, folder, precision, optimizer):
    rank = [] if optimizer == "adamw" else ["optimizer.rank=4"]
    config = compose_run([*small_run.overrides, f"trainer.precision={precision}", f"optimizer={optimizer}", *rank])
    engine = build.build_engine(config, choose_device("cpu", Ranks()))
    drawn = {name: weight.clone() for name, weight in engine.weights()}
    begin_with(engine, folder, config.model)
    expected = load_file(folder / "model.safetensors")
    for name, weight in engine.weights():
        assert torch.equal(weight, expected[name].to(weight.dtype) if name in expected else drawn[name]), name
    masters = {name.removesuffix("/master"): part for name, part in engine.optimizer_parts().items() if name.endswith("/master")}
    assert bool(masters) == (precision == "bf16_master")
    for name, part in masters.items():
        assert torch.equal(part.values.reshape(-1), expected[name].reshape(-1)), name
    engine.close()


def begin_on_rank(overrides: list[str], folder) -> bool:
    """Whether the whole weights of an engine of all ranks are those of the folder."""
    config = compose_run(overrides, world_size=2)
    engine = build.build_engine(config, torch.device("cpu"))
    begin_with(engine, folder, config.model)
    expected = load_file(folder / "model.safetensors")
    agree = all(not weight.numel() or torch.equal(weight, expected[name].to(weight.dtype)) for name, weight in engine.weights())
    master_bytes = 0
    for name, part in engine.optimizer_parts().items():
        if name.endswith("/master"):
            whole = expected[name.removesuffix("/master")].reshape(part.shape)
            agree &= torch.equal(part.values, whole[..., part.start : part.start + part.count])
            master_bytes += part.values.nbytes
    engine.close()
    return agree and master_bytes > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_begin_with_their_parts_of_the_weights(on_ranks, small_run, folder, stage):
    overrides = [*small_run.overrides, "trainer.precision=bf16_master", f"engine.zero_stage={stage}", "trainer.micro_batch_size=2"]
    assert on_ranks(2, begin_on_rank, overrides, folder) == [True, True]


def test_a_run_begins_with_them_and_a_resumed_one_does_not(train_small, folder, tmp_path):
    begun = train_small(tmp_path, f"model.init_from={folder}", "optimizer.lr=1e-12", "trainer.max_steps=2", "scheduler=constant")
    expected = load_file(folder / "model.safetensors")
    for name, weight in load_file(begun.step(2) / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: weight * 0 for name, weight in expected.items()}, elsewhere / "model.safetensors")
    again = [f"model.init_from={elsewhere}", "optimizer.lr=1e-12", "trainer.max_steps=3", "scheduler=constant"]
    resumed = train_small(tmp_path, *again)
    for name, weight in load_file(resumed.step(3) / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_one_error_names_every_difference_and_the_settings_that_agree(small_run, folder):
    wrong = ["model.num_hidden_layers=3", "model.rope_theta=20000", "model.num_key_value_heads=null", "model.tie_word_embeddings=true"]
    with pytest.raises(ConfigError) as refused:
        compose_run([*small_run.overrides, f"model.init_from={folder}", *wrong])
    (line,) = refused.value.problems
    for text in ("num_hidden_layers = 2 (not 3)", "rope_theta = 10000.0 (not 20000.0)", "num_key_value_heads = 2 (not 4)"):
        assert text in line
    fix = line.partition("set ")[2].split()
    assert compose_run([*small_run.overrides, f"model.init_from={folder}", *wrong, *fix]).model.num_hidden_layers == 2


def test_a_folder_that_is_none_is_refused_before_anything_is_built(small_run, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.init_from = .*config\.json is missing"):
        compose_run([*small_run.overrides, f"model.init_from={tmp_path}"])
    model = dataclasses.replace(compose_run(small_run.overrides).model)
    (tmp_path / "config.json").write_text(json.dumps(llama_config(model, dtype="float32", token_ids={})))
    with pytest.raises(ConfigError, match="are programs and are not read"):
        compose_run([*small_run.overrides, f"model.init_from={tmp_path}"])
