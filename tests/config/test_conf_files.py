"""The files of conf/: each composes into a valid run, and the experiments are the published benchmark."""

import dataclasses
import re
from pathlib import Path

import pytest

from ngpt.config.compose import CONF_DIR, compose_run, group_choices
from ngpt.config.optimizers import AdamWConfig, GaLoreConfig, LowRankConfig, NaturalGaLoreConfig
from ngpt.config.schema import GROUPS, steps_in_run, warmup_steps_in_run

FILES = sorted(path.relative_to(CONF_DIR).with_suffix("") for path in CONF_DIR.glob("*/*.yaml") if path.parent.name != "experiment")
BENCHMARK = {  # GaLore's configs/*.json and Table 2: hidden, inner, blocks, heads, steps, rank
    "60m": (512, 1376, 8, 8, 10_000, 128),
    "130m": (768, 2048, 12, 12, 20_000, 256),
    "350m": (1024, 2736, 24, 16, 60_000, 256),
    "1b": (2048, 5461, 24, 32, 100_000, 512),
}
OPTIMIZERS = {"adamw": AdamWConfig, "galore": GaLoreConfig, "natural_galore": NaturalGaLoreConfig}


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name != "model"], ids=str)
def test_every_file_composes_into_a_valid_run(file: Path):
    config = compose_run(["data=synthetic", "trainer.max_steps=100", f"{file.parent}={file.name}"], check_files=False)
    assert isinstance(getattr(config, file.parent.name), tuple(GROUPS[file.parent.name].values()))


@pytest.mark.parametrize("file", [path.relative_to(CONF_DIR) for path in sorted(CONF_DIR.rglob("*.yaml"))], ids=str)
def test_a_file_holds_values_only_and_says_what_it_is_for(file: Path):
    text = (CONF_DIR / file).read_text()
    assert re.match(r"(# @package _global_\n)?# \S.{20,}", text)
    assert "_target_" not in text


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("9m", (128, 352, 4, 4, 1024)),
        ("20m", (256, 688, 4, 4, 1024)),
        ("60m", (512, 1376, 8, 8, 1024)),
        ("130m", (768, 2048, 12, 12, 1024)),
        ("350m", (1024, 2736, 24, 16, 1024)),
        ("1b", (2048, 5461, 24, 32, 1024)),
        ("7b", (4096, 11008, 32, 32, 2048)),
    ],
)
def test_models_have_the_benchmarks_shapes(name: str, shape: tuple[int, ...]):
    model = compose_run([f"model=llama_{name}", "data=synthetic", "optimizer=adamw", "trainer.max_steps=1"]).model
    found = (model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.num_attention_heads, model.max_seq_len)
    assert found == shape
    assert (model.name, model.vocab_size, model.num_key_value_heads, model.rms_norm_eps) == (f"llama_{name}", 32000, None, 1e-6)
    assert (model.initializer_range, model.tie_word_embeddings) == (0.02, False)
    projected = model.num_hidden_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size)
    parameters = projected + 2 * model.vocab_size * model.hidden_size + (2 * model.num_hidden_layers + 1) * model.hidden_size
    comment = (CONF_DIR / "model" / f"llama_{name}.yaml").read_text().splitlines()[0]
    assert comment.startswith(f"# {parameters / 1e6:,.1f} M parameters with 32,000 tokens, {projected / 1e6:,.1f} M of them")


@pytest.mark.parametrize("size", BENCHMARK)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_experiments_follow_the_published_protocol(size: str, optimizer: str):
    *shape, steps, rank = BENCHMARK[size]
    config = compose_run([f"experiment=c4_{size}_{optimizer}"], check_files=False)
    model, trainer, scheduler = config.model, config.trainer, config.scheduler
    assert [model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.num_attention_heads] == shape
    assert trainer.global_batch_size * trainer.seq_len == 131_072
    ours = optimizer == "natural_galore"  # the project's default in place of a published method: with stochastic rounding
    assert (trainer.seq_len, trainer.grad_clip, trainer.precision) == (256, 0.0, "bf16" if ours else "bf16_nearest")
    assert steps_in_run(trainer) == steps
    assert (scheduler.name, warmup_steps_in_run(scheduler, steps), scheduler.min_lr_ratio) == ("cosine", steps // 10, 0.1)
    assert (config.data.name, config.data.packing, config.tokenizer.path) == ("c4", "pad", "spiece.model")
    assert (config.logger.wandb, config.run.name) == ("online", f"c4_{size}_{optimizer}")
    assert type(config.optimizer) is OPTIMIZERS[optimizer]
    assert (config.optimizer.weight_decay, config.optimizer.betas) == (0.0, [0.9, 0.99 if ours else 0.999])
    assert config.optimizer.state_dtype == "bf16"
    if isinstance(config.optimizer, LowRankConfig):
        assert (config.optimizer.lr, config.optimizer.rank) == (0.01, rank)
        assert (config.optimizer.update_proj_gap, config.optimizer.scale) == (200, 0.25)
    else:
        assert config.optimizer.lr in (1e-2, 5e-3, 1e-3, 5e-4, 1e-4)  # the paper's grid


@pytest.mark.parametrize("size", BENCHMARK)
def test_experiments_open_with_what_they_cost(size: str):
    hidden, inner, blocks, _, steps, _ = BENCHMARK[size]
    multiplied = blocks * (4 * hidden**2 + 3 * hidden * inner) + 32000 * hidden
    flops_per_token = 3 * (2 * multiplied + 4 * blocks * 256 * hidden)  # forward, and backward at twice that
    for optimizer in OPTIMIZERS:
        text = (CONF_DIR / "experiment" / f"c4_{size}_{optimizer}.yaml").read_text()
        flops = re.search(r"([\d.]+) ([MG])FLOP per token, ([\d.e]+) FLOP in all", text)
        billions = re.search(r"([\d.]+) billion in all", text)
        assert float(flops[1]) * {"M": 1e6, "G": 1e9}[flops[2]] == pytest.approx(flops_per_token, rel=0.01)
        assert float(flops[3]) == pytest.approx(flops_per_token * steps * 131_072, rel=0.05)
        assert float(billions[1]) * 1e9 == pytest.approx(steps * 131_072, rel=0.01)
        assert "Perplexity, published:" in text
        assert "val/perplexity_galore_protocol" in text


def test_quickstart_needs_no_network_and_no_account(folder: Path, tokenizer_model: bytes):
    (folder / "runs/quickstart").mkdir(parents=True)
    (folder / "runs/quickstart/tokenizer.model").write_bytes(tokenizer_model)
    config = compose_run(["experiment=quickstart"])
    assert (config.data.name, config.logger.wandb, config.run.name) == ("builtin", "disabled", "quickstart")
    assert (config.model.name, config.model.vocab_size, config.optimizer.name) == ("llama_9m", 4096, "natural_galore")
    assert (config.trainer.precision, config.eval.unigram_baseline) == ("fp32", True)


def test_defaults_live_in_the_schema_alone():
    default = compose_run(["data=synthetic", "trainer.max_steps=1"])
    for group in ("trainer", "checkpoint", "eval", "tokenizer", "logger"):
        (schema,) = GROUPS[group].values()
        expected = schema(max_steps=1) if group == "trainer" else schema()
        assert dataclasses.asdict(getattr(default, group)) == dataclasses.asdict(expected)


def test_choices_are_listed_small_models_first():
    assert group_choices("model") == [*(f"llama_{size}" for size in ("9m", "20m", "60m", "130m", "350m", "1b", "7b")), "tinyllama_1b"]
    assert group_choices("data") == ["builtin", "c4", "local_c4", "synthetic", "tokenized"]
