"""Trained models are found in every place where they lie, and are what was saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.config.compose import compose_run
from ngpt.config.llama_folder import NotLlama, differences, llama_config, read_llama_config
from ngpt.config.recorded import NotRecorded, read_recorded_config
from ngpt.model.cost import parameter_count
from ngpt.model.lora import merged_weights
from ngpt.trained import find_source, open_trained


@pytest.fixture
def llama_folder(small_run, tmp_path):
    """A folder in Hugging Face's layout, made by hand."""
    folder = tmp_path / "llama"
    folder.mkdir()
    source = find_source(small_run.folder)
    (folder / "config.json").write_text(json.dumps(llama_config(source.config, dtype="float32", token_ids={})))
    shutil.copy(source.folder / "model.safetensors", folder)
    shutil.copy(source.folder / "tokenizer.model", folder)
    return folder


def change(folder, **values):
    path = folder / "config.json"
    tree = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in tree.items() if value != "absent"}))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_a_run_a_step_and_a_llama_folder_open_as_the_same_model(small_run, llama_folder):
    saved = load_file(small_run.step(4) / "model.safetensors")
    for path in (small_run.folder, small_run.folder / "checkpoints", small_run.step(4), llama_folder):
        trained = open_trained(path)
        assert_same(dict(trained.model.named_parameters()), saved)
        assert trained.tokenizer.fingerprint == small_run.tokenizer.fingerprint
        assert not any(parameter.requires_grad for parameter in trained.model.parameters())
        assert differences(trained.source.config, find_source(small_run.folder).config) == {}
    assert find_source(small_run.step(2)).step == 2
    assert find_source(llama_folder).run is None
    assert open_trained(llama_folder, dtype=torch.bfloat16).model.lm_head.weight.dtype is torch.bfloat16


def test_the_recorded_settings_are_those_of_the_run(small_run):
    config = compose_run(small_run.overrides)
    assert read_recorded_config(small_run.step(4) / "config.yaml") == config
    old = small_run.step(4) / "config.yaml"
    with pytest.raises(NotRecorded, match="cannot be read"):
        read_recorded_config(old.with_name("nothing.yaml"))


def test_settings_that_are_younger_than_a_run_have_their_defaults(small_run, tmp_path):
    text = (small_run.step(4) / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  unigram_baseline: false\n", "  of_the_future: 1\n"))
    assert read_recorded_config(tmp_path / "config.yaml") == compose_run(small_run.overrides)
    (tmp_path / "config.yaml").write_text(text.replace("  hidden_size: 32\n", "  hidden_size: 32\n  experts: 8\n"))
    with pytest.raises(NotRecorded, match=r"model\.experts is not known"):
        read_recorded_config(tmp_path / "config.yaml")


def test_adapters_are_merged(train_small, tmp_path):
    run = train_small(tmp_path, "optimizer=lora", "optimizer.rank=4", "eval.at_end=false", "eval.every_steps=0", "checkpoint.every_steps=0")
    saved = load_file(run.step(4) / "model.safetensors")
    merged = merged_weights(saved, alpha=compose_run(run.overrides).optimizer.lora_alpha)
    assert any(not torch.equal(merged[name], saved[name]) for name in merged)
    assert_same(dict(open_trained(run.folder).model.named_parameters()), merged)


def test_a_changed_checkpoint_is_refused(small_run, tmp_path):
    step = tmp_path / "step-0000004"
    shutil.copytree(small_run.step(4), step)
    weights = step / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its content is not what was saved"):
        find_source(step)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', must be 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling asks for positions of type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters asks for positions of type 'yarn'"),
        ({"head_dim": 64}, "head_dim is 64, must be hidden_size / num_attention_heads = 8"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"quantization_config": {}}, "quantization_config is"),
    ],
)
def test_what_is_no_plain_llama_is_refused(llama_folder, changes, complaint):
    change(llama_folder, **changes)
    with pytest.raises(NotLlama, match=complaint):
        read_llama_config(llama_folder)
    with pytest.raises(CheckpointError, match=complaint):
        find_source(llama_folder)


def test_old_and_new_spellings_of_a_config_mean_the_same(llama_folder):
    change(llama_folder, rope_theta=5e5)
    config = read_llama_config(llama_folder)
    assert config.rope_theta == 5e5
    change(llama_folder, rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert read_llama_config(llama_folder) == config
    change(llama_folder, num_key_value_heads="absent")
    assert read_llama_config(llama_folder).num_key_value_heads is None


def test_shards_are_read_and_a_pickle_is_not(llama_folder):
    weights = load_file(llama_folder / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part} | {f"{file}.rotary_emb.inv_freq": torch.ones(2)}, llama_folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (llama_folder / "model.safetensors").unlink()
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(dict(open_trained(llama_folder).model.named_parameters()), weights)
    (llama_folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors cannot be read"):
        find_source(llama_folder)
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        find_source(llama_folder)
    (llama_folder / "model.safetensors.index.json").unlink()
    (llama_folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        find_source(llama_folder)


def test_weights_that_do_not_fit_the_config_are_named(llama_folder):
    change(llama_folder, intermediate_size=40, num_hidden_layers=1)
    with pytest.raises(CheckpointError) as refused:
        open_trained(llama_folder)
    assert "unknown: model.layers.1.mlp.gate_proj.weight" in str(refused.value)
    assert "model.layers.0.mlp.down_proj.weight: (32, 48) in the file, (32, 40) in the model" in str(refused.value)


def test_a_tied_head_is_the_embedding(llama_folder):
    change(llama_folder, tie_word_embeddings=True)
    model = open_trained(llama_folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_places_without_a_model_are_named(small_run, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_source(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        find_source(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        find_source(tmp_path)


def test_tinyllama_has_its_published_size():
    model = compose_run(["model=tinyllama_1b", "data=synthetic", "trainer.max_steps=100"]).model
    assert parameter_count(model) == 1_100_048_384
    assert (model.num_attention_heads, model.num_key_value_heads, model.max_seq_len, model.rms_norm_eps) == (32, 4, 2048, 1e-5)
