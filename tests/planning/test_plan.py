"""Plans: parameters and state against real optimizers, formulas against independent ones, advice that is true, the command."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from typing import Any

import pytest
import torch

from ngpt import plan
from ngpt.build import build_model, build_optimizer
from ngpt.config.compose import CONF_DIR, compose_run
from ngpt.config.devices import GPUS, gpu_called, gpu_of
from ngpt.config.schema import RunConfig
from ngpt.engine.zero_cost import memory_per_rank
from ngpt.optim import state_bytes
from ngpt.planning import fit
from ngpt.planning.activations import activations_of
from ngpt.planning.memory import estimate_memory, setup_of
from ngpt.planning.page import Target, against_plan, beside, duration, plan_page, short_plan
from ngpt.planning.parameters import layers_of, parameters_of
from ngpt.planning.throughput import work_of

OPTIMIZERS = sorted(path.stem for path in (CONF_DIR / "optimizer").glob("*.yaml"))


@functools.cache
def run_of(*overrides: str, ranks: int = 1) -> RunConfig:
    small = ["model=llama_60m", "data=synthetic", "trainer.max_steps=10"]
    return compose_run([*small, *overrides], world_size=ranks, check_files=False)


@functools.cache
def one_billion(*overrides: str, ranks: int = 1) -> RunConfig:
    return compose_run(["experiment=c4_1b_natural_galore", *overrides], world_size=ranks, check_files=False)


def with_trainer(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **values))


# ------------------------------------------------------------------------------------------------- parameters and state
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("others", [[], ["trainer.precision=bf16_master", "model.tie_word_embeddings=true", "optimizer.state_dtype=8bit"]])
def test_names_shapes_and_state_are_those_of_the_real_model_and_optimizer(optimizer: str, others: list[str]) -> None:
    config = run_of(f"optimizer={optimizer}", *others)
    with torch.device("meta"):
        model = build_model(config).to(torch.float32 if config.trainer.precision == "fp32" else torch.bfloat16)
        real = build_optimizer(model, config=config.optimizer, precision=config.trainer.precision, seed=0)
    planned = parameters_of(config)
    assert {p.name: p.shape for p in planned} == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {p.name for p in planned if p.settings is None} == {name for name, p in model.named_parameters() if not p.requires_grad}
    merges = 8 * sum("lora" in p.name for p in planned) if optimizer == "relora" else 0  # ReLoRA counts the merges of each adapter
    estimate = estimate_memory(config)
    assert abs(sum(estimate.state.values()) + merges - state_bytes(real)["total"]) <= merges
    assert estimate.peak.sizes["weights"] == sum(p.nbytes for p in model.parameters())


def test_a_matrix_whose_short_side_is_not_above_the_rank_is_left_to_adamw() -> None:
    small = ["model.vocab_size=300", "optimizer.embeddings=true", "trainer.precision=fp32"]
    for rank, projected in ((299, 7 * 8 + 2), (300, 7 * 8)):  # 7 matrices in each of 8 blocks; embedding and head of 300 rows
        config = run_of("optimizer=galore", *small)
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, rank=rank))  # a run would be refused
        with torch.device("meta"):
            real = build_optimizer(build_model(config), config=config.optimizer, precision=config.trainer.precision, seed=0)
        assert sum("rank" in (parameter.settings or {}) for parameter in parameters_of(config)) == projected
        assert sum(estimate_memory(config).state.values()) == state_bytes(real)["total"]


def test_under_zero_weights_and_state_are_those_of_the_formulas_for_ranks() -> None:
    for stage in range(4):
        config = one_billion(f"engine.zero_stage={stage}", "trainer.micro_batch_size=8", ranks=8)
        sizes, peak = memory_per_rank(layers_of(parameters_of(config)), setup_of(config, 8)), estimate_memory(config, ranks=8).peak
        assert (peak.sizes["weights"], peak.sizes["optimizer state"]) == (sizes["weights"], sizes["state"])


# ------------------------------------------------------------------------------------------------------------ activations
def test_a_block_keeps_ten_arrays_of_the_width_and_four_of_the_feed_forward_layer() -> None:
    config = one_billion()
    kept = activations_of(config, bytes_per_weight=2, on_gpu=True)
    tokens = 16 * 256
    assert kept.blocks == (tokens * (2 * (10 * 2048 + 4 * 5461) + 4 * 32 + 8),) * 24
    assert kept.logits == 2 * 4 * 1024 * 32000


def test_a_recomputed_block_keeps_its_input_and_comes_back_whole() -> None:
    every = activations_of(one_billion("trainer.activation_checkpointing=every_3"), bytes_per_weight=2, on_gpu=True)
    none = activations_of(one_billion(), bytes_per_weight=2, on_gpu=True)
    stream = 16 * 256 * 2048 * 2
    assert [kept == stream for kept in every.blocks] == [layer % 3 == 0 for layer in range(24)]
    assert all(kept + again == whole for kept, again, whole in zip(every.blocks, every.recomputed, none.blocks, strict=True))


def test_more_sequences_never_need_less_and_less_is_never_planned_for_more_checkpointing() -> None:
    for name, values in (("micro_batch_size", (1, 2, 4, 8, 16, 32)), ("activation_checkpointing", ("full", "every_2", "every_4", "off"))):
        peaks = [estimate_memory(with_trainer(one_billion(), **{name: value})).peak.total for value in values]
        assert peaks == sorted(peaks)


# -------------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer=adamw", "optimizer.apply=whole"], lambda n, low, rest: 2 * n),
        (["optimizer=adamw", "optimizer.apply=deferred"], lambda n, low, rest: 4 * n),  # micro-batches are added up in fp32
        (["optimizer=natural_galore", "optimizer.apply=deferred"], lambda n, low, rest: 4 * n),
        (["optimizer=galore", "optimizer.apply=deferred"], lambda n, low, rest: 4 * (low + rest)),
    ],
)
def test_gradients_are_kept_as_the_mode_says(overrides: list[str], expected: Any) -> None:
    config = run_of("trainer.precision=bf16", "trainer.micro_batch_size=16", *overrides)
    rank = 128
    matrices = [p.shape for p in parameters_of(config) if p.kind in ("attention", "feed-forward")]
    numel = sum(p.numel for p in parameters_of(config))
    low, rest = sum(rank * max(shape) for shape in matrices), numel - sum(a * b for a, b in matrices)
    norm = next(moment for moment in estimate_memory(config).moments if moment.name == "the norm of the gradient")
    assert norm.sizes["gradients"] == expected(numel, low, rest)


def test_immediate_updates_keep_no_gradient() -> None:
    config = run_of("optimizer.apply=immediate", "trainer.micro_batch_size=16", "trainer.global_batch_size=16", "trainer.precision=bf16")
    head = 32000 * 512
    # The head's alone, added up in fp32 over four chunks of logits, and its rounded copy.
    assert estimate_memory(config).largest["gradients"] == (4 + 2) * head


# ------------------------------------------------------------------------------------------------------- what fits, advice
def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    config = one_billion()
    for gigabytes in fit.CARDS_GB:
        size = fit.largest_micro_batch(config, gigabytes, ranks=1)
        sizes = [2**power for power in range(10)]
        fitting = [n for n in sizes if fit.fits(estimate_memory(with_trainer(config, micro_batch_size=n)), gigabytes)]
        assert size == (max(fitting) if fitting else None)


def test_advice_saves_what_it_says_and_obeys_the_rules_of_a_run() -> None:
    for ranks, overrides in ((1, []), (4, ["trainer.micro_batch_size=128", "optimizer.apply=deferred"])):
        before = estimate_memory(one_billion(*overrides, ranks=ranks), ranks=ranks).peak.total
        found = fit.remedies(one_billion(*overrides, ranks=ranks), ranks=ranks)
        assert [remedy.saved for remedy in found] == sorted((remedy.saved for remedy in found), reverse=True)
        assert len(found) >= 4
        for remedy in found:
            assert before - estimate_memory(remedy.config, ranks=ranks).peak.total == remedy.saved > 0
        changed = one_billion(*overrides, *(remedy.overrides for remedy in found[:1]), ranks=ranks)
        assert changed == found[0].config
        assert any("offload_optimizer" in remedy.overrides for remedy in found) == (ranks == 4)


def test_what_would_fit_fits_and_keeps_the_training_where_it_can() -> None:
    config = one_billion("trainer.micro_batch_size=64")
    taken, estimate = fit.what_fits(config, 24, ranks=1)
    assert all(remedy.same for remedy in taken)
    assert fit.fits(estimate, 24)
    again = one_billion("trainer.micro_batch_size=64", *(remedy.overrides for remedy in taken))
    assert estimate_memory(again).peak == estimate.peak
    _, estimate = fit.what_fits(compose_run(["model=llama_7b", "data=synthetic", "trainer.max_steps=1"], check_files=False), 8, ranks=1)
    assert not fit.fits(estimate, 8)


# ------------------------------------------------------------------------------------------------------------ the work
def test_operations_and_time_follow_from_tokens() -> None:
    work = work_of(one_billion())
    assert (work.steps, work.tokens) == (100_000, 13_107_200_000)
    assert work.flops == work.tokens * work.flops_per_token == pytest.approx(1.02e20, rel=0.01)
    assert work.seconds(1e15, mfu=0.5, ranks=4) == pytest.approx(work.flops / 2e15)
    again = work_of(one_billion("trainer.activation_checkpointing=full"))
    forward_of_blocks = work.flops_per_token / 3 - 2 * 32000 * 2048
    assert again.recomputed_per_token == pytest.approx(forward_of_blocks)


def test_gpus_are_found_by_their_drivers_names_and_by_keys() -> None:
    assert {gpu_called(gpu.key) for gpu in GPUS} == set(GPUS)
    assert gpu_called("RTX-4090") == gpu_of("NVIDIA GeForce RTX 4090")
    assert gpu_of("NVIDIA A100-SXM4-40GB").gigabytes == 40
    assert gpu_of("NVIDIA A100-SXM4-80GB").gigabytes == 80
    assert gpu_of("NVIDIA A1000") is None


# --------------------------------------------------------------------------------------------------------------- the page
def test_the_page_shows_the_run_beside_adamw_and_galore(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--device", "rtx4090", "experiment=c4_1b_natural_galore"]) == 0
    page = capsys.readouterr().out
    assert "1,339,082,752" in page
    assert "512 sequences = 16 (micro-batch) x 32 (accumulated) x 1 process; x 256 = 131,072 tokens a step" in page
    assert "a card of 24 GB is enough" in page
    rows = {line.rpartition("  ")[0].split("  ")[0]: line.split() for line in page.splitlines()}
    sizes = estimate_memory(one_billion()).peak
    assert rows["peak"][1] == f"{sizes.total / 2**30:.2f}"
    columns = beside(one_billion())
    assert list(columns) == ["natural_galore", "adamw", "galore"]
    assert columns["galore"].optimizer.rank == 512


def test_the_terms_of_the_page_add_up_to_the_peak() -> None:
    for moment in estimate_memory(one_billion()).moments:
        assert moment.total == sum(moment.sizes.values())
    assert estimate_memory(one_billion()).peak.total == max(moment.total for moment in estimate_memory(one_billion()).moments)


@pytest.mark.parametrize("optimizer", ["adarankgrad", "lora", "natural_galore_paper"])
def test_every_kind_of_optimizer_has_a_page(optimizer: str) -> None:
    page = plan_page(run_of(f"optimizer={optimizer}", "trainer.precision=bf16"), Target(None, 12.0, 1, 0.4))
    assert "12 GB" in page
    assert "nan" not in page


def test_a_short_plan_and_the_measured_peak_beside_it() -> None:
    estimate = estimate_memory(one_billion())
    assert short_plan(estimate).startswith(f"planned peak {estimate.peak.total / 2**30:.2f} GiB of tensors (weights 2.49 GiB")
    assert against_plan(estimate, estimate.peak.total * 1.05).endswith("(+5.0%)")


def test_durations_have_units_that_fit() -> None:
    assert [duration(seconds) for seconds in (1, 100, 7200, 86400 * 10, 86400 * 800)] == [
        "1 seconds", "1.67 minutes", "2 hours", "10 days", "2.19 years",
    ]  # fmt: skip


def test_the_pages_in_the_documentation_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    document = (CONF_DIR.parent / "docs/plan.md").read_text(encoding="utf-8")
    blocks = [block for block in document.split("```\n") if block.startswith("$ python -m ngpt.plan")]
    assert len(blocks) == 3
    for block in blocks:
        command, _, page = block.replace("\\\n", " ").partition("\n")
        assert plan.main(shlex.split(command)[4:]) == 0
        assert capsys.readouterr().out == page


# ------------------------------------------------------------------------------------------------------------ the command
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=llama_1c"], "did you mean model=llama_1b?"),
        (["--device", "rtx4080", "experiment=c4_1b_adamw"], "did you mean --device rtx4090?"),
        (["--device", "abacus", "experiment=c4_1b_adamw"], "--memory GB"),
        (["experiment=c4_1b_adamw", "--ranks", "3"], "trainer.global_batch_size"),
        (["experiment=c4_1b_adamw", "optimizer.learning_rate=1"], "did you mean optimizer.lr?"),
    ],
)
def test_mistakes_are_answered_as_by_the_train_command(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert plan.main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rank", "2"], ["--mfu", "40"], ["--memory", "much"], ["--ranks", "0"]])
def test_wrong_options_end_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main([*arguments, "experiment=c4_1b_adamw"])
    assert caught.value.code == 2


def test_nothing_is_allocated_for_a_plan_of_7_billion_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was made")

    for name in ("empty", "zeros", "ones", "tensor", "randn"):
        monkeypatch.setattr(torch, name, refuse)
    config = compose_run(["model=llama_7b", "data=synthetic", "trainer.max_steps=1", "trainer.precision=bf16"], check_files=False)
    assert estimate_memory(config).peak.total > 6.7e9 * 2
