"""Training under DeepSpeed at every stage, on one rank and on two, is training on one process."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import math
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ngpt.config.schema import ModelConfig
from ngpt.dist.collectives import Collectives
from ngpt.engine.deepspeed_config import deepspeed_config
from ngpt.engine.deepspeed_contract import UnknownDeepSpeed, check_deepspeed
from ngpt.engine.local import LocalEngine
from ngpt.engine.update_cycle import UpdateCycle
from ngpt.model.llama import LlamaForCausalLM, compile_blocks
from ngpt.model.lora import add_adapters
from ngpt.optim import AdamW, NaturalGaLore, low_rank_groups
from ngpt.optim.sharding import WHOLE, Sharding

CPU = torch.device("cpu")
STAGES = (0, 1, 2, 3)
RANKS = (1, 2)
SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "max_seq_len": 16}
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --------------------------------------------------------------------------------------------------------- in the ranks
def build_model(*, checkpoint_every: int = 0, tied: bool = True, compiled: bool = False, adapted: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(ModelConfig(**SHAPE, tie_word_embeddings=tied), checkpoint_every=checkpoint_every)
    if adapted:
        add_adapters(model, rank=3, alpha=6.0)
    if compiled:
        compile_blocks(model, backend="aot_eager")
    return model


def adamw(model: torch.nn.Module, sharding: Sharding = WHOLE) -> AdamW:
    return AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=0.01, sharding=sharding)


def natural(model: torch.nn.Module, sharding: Sharding = WHOLE, *, fisher: str = "history") -> NaturalGaLore:
    groups = low_rank_groups(model, rank=4, shape_of=sharding.shape)
    return NaturalGaLore(groups, lr=0.01, fisher=fisher, sharding=sharding)


OPTIMIZERS: dict[str, Callable[..., AdamW]] = {
    "adamw": adamw,
    "history": natural,
    "diagonal": functools.partial(natural, fisher="diagonal"),
}


@contextlib.contextmanager
def zero_engine(
    stage: int,
    *,
    optimizer: str = "adamw",
    dtype: str = "fp32",
    apply: str = "deferred",
    clip: float = 0.0,
    options: dict[str, Any] | None = None,
    **model: Any,
) -> Iterator[Any]:
    """The engine of this rank; its hooks are gone afterwards."""
    from ngpt.engine.deepspeed_engine import ZeroEngine

    given = options if options is not None else PARTITION_ALL if stage == 3 else {}
    config = deepspeed_config(given, zero_stage=stage, micro_batch_size=2, accumulation_steps=2, world_size=Collectives().size)
    engine = ZeroEngine(
        functools.partial(build_model, **model),
        OPTIMIZERS[optimizer],
        config,
        zero_stage=stage,
        device=CPU,
        dtype=DTYPES[dtype],
        apply=apply,
        grad_clip=clip,
    )
    try:
        yield engine
    finally:
        engine.close()


def local_engine(
    *, optimizer: str = "adamw", dtype: str = "fp32", apply: str = "deferred", clip: float = 0.0, options: Any = None, **model: Any
) -> LocalEngine:
    build = functools.partial(build_model, **model)
    return LocalEngine(build, OPTIMIZERS[optimizer], device=CPU, dtype=DTYPES[dtype], apply=apply, grad_clip=clip)


def rows(step: int, count: int = 8) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (count, 9), generator=torch.Generator().manual_seed(step))


def inputs(tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def train(
    engine: UpdateCycle, steps: range, *, rank: int = 0, size: int = 1, micro_batches: int = 2, evaluates: bool = False
) -> list[float]:
    """Losses of the updates of `steps` on this rank's share of each batch."""
    losses = []
    for step in steps:
        batch = rows(step)
        engine.begin_update(lr_multiplier=1.0 / (step + 1), loss_divisor=64.0, num_micro_batches=micro_batches)
        loss = torch.zeros(())
        for micro_batch in batch.chunk(size)[rank].chunk(micro_batches):
            loss += engine.accumulate(inputs(micro_batch))
            if evaluates:
                engine.evaluate(inputs(rows(100)))
        outcome = engine.finish_update(loss / 64.0)
        assert outcome.applied
        losses.append(outcome.loss)
        if evaluates:
            engine.evaluate(inputs(rows(101)))
    return losses


def whole_weights(engine: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.weights()}


def run(
    stage: int, steps: int, options: dict[str, Any], training: dict[str, Any]
) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """Initial weights (all of them on rank 0), losses, final weights."""
    ranks = Collectives()
    with zero_engine(stage, **options) as engine:
        first = whole_weights(engine)
        losses = train(engine, range(steps), rank=ranks.rank, size=ranks.size, **training)
        return first, losses, whole_weights(engine)


def run_stages(stages: tuple[int, ...], steps: int, options: dict[str, Any], training: dict[str, Any]) -> list[Any]:
    """One engine after another in one process."""
    return [run(stage, steps, options, training) for stage in stages]


def assert_equals_local(
    results: list[Any], stages: tuple[int, ...], steps: int, options: dict[str, Any], training: dict[str, Any], tolerance: float
) -> None:
    local = local_engine(**options)
    first = whole_weights(local)
    losses = train(local, range(steps), **training)
    last = whole_weights(local)
    for stage, (zero_first, zero_losses, zero_last) in zip(stages, results, strict=True):
        assert list(zero_first) == list(first)
        for name, weight in first.items():
            assert torch.equal(zero_first[name], weight), f"stage {stage}: {name} is not drawn as on one process"
        assert zero_losses == pytest.approx(losses, rel=max(tolerance, 1e-6)), f"stage {stage}"
        for name, weight in last.items():
            torch.testing.assert_close(
                zero_last[name], weight, rtol=0, atol=tolerance, msg=lambda text, n=name, s=stage: f"stage {s}, {n}: {text}"
            )


# ---------------------------------------------------------------------------------------------------- equal to one process
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"optimizer": "adamw", "clip": 0.5}, {"micro_batches": 2}),
        ({"optimizer": "history"}, {"micro_batches": 1}),
        ({"optimizer": "diagonal", "tied": False, "clip": 0.5}, {"micro_batches": 1}),
        ({"optimizer": "diagonal", "apply": "immediate"}, {"micro_batches": 1}),
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_every_stage_equals_the_local_engine(on_ranks, ranks, options, training):
    results = on_ranks(ranks, run_stages, STAGES, 3, options, training)[0]
    assert_equals_local(results, STAGES, 3, options, training, tolerance=2e-6)


def test_ranks_among_which_no_weight_divides_evenly_equal_the_local_engine(on_ranks):
    training = {"micro_batches": 1}
    results = on_ranks(3, run_stages, (1, 3), 2, {"optimizer": "diagonal"}, training)[0]
    assert_equals_local(results, (1, 3), 2, {"optimizer": "diagonal"}, training, tolerance=2e-6)


@pytest.mark.parametrize("ranks", RANKS)
def test_bf16_weights_start_with_the_same_bits_and_stay_near(on_ranks, ranks):
    """Gradients are rounded to bf16 before they are summed over ranks, and weights at random: only the start is the same bit by bit."""
    options, training = {"optimizer": "adamw", "dtype": "bf16"}, {"micro_batches": 2}
    results = on_ranks(ranks, run_stages, STAGES, 2, options, training)[0]
    assert all(weight.dtype == torch.bfloat16 for _, _, last in results for weight in last.values())
    local = local_engine(**options)
    first = whole_weights(local)
    losses = train(local, range(2), **training)
    for zero_first, zero_losses, _ in results:
        assert all(torch.equal(zero_first[name], weight) for name, weight in first.items())
        assert zero_losses == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("options", [{"checkpoint_every": 1}, {"checkpoint_every": 2, "tied": False}, {"adapted": True, "tied": False}])
def test_recomputed_blocks_and_frozen_weights_train_at_every_stage(on_ranks, options):
    results = on_ranks(2, run_stages, STAGES, 2, options, {})[0]
    assert_equals_local(results, STAGES, 2, options, {}, tolerance=2e-6)


@pytest.mark.slow
def test_compiled_blocks_train_at_stages_1_and_3(on_ranks):
    results = on_ranks(2, run_stages, (1, 3), 2, {"compiled": True}, {}, timeout=300)[0]
    assert_equals_local(results, (1, 3), 2, {"compiled": True}, {}, tolerance=2e-6)


def test_evaluation_between_and_inside_updates_changes_nothing(on_ranks):
    plain = on_ranks(2, run_stages, STAGES, 3, {}, {})[0]
    evaluated = on_ranks(2, run_stages, STAGES, 3, {}, {"evaluates": True})[0]
    for (_, losses, last), (_, other_losses, other_last) in zip(plain, evaluated, strict=True):
        assert losses == other_losses
        assert all(torch.equal(last[name], weight) for name, weight in other_last.items())


def options_of_stage_3(options: dict[str, Any]) -> list[float]:
    return run(3, 2, {"options": {"zero_optimization": options}}, {})[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"offload_param": {"device": "cpu", "pin_memory": False}},
        {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
        {"overlap_comm": False, "allgather_sequential": True},
        {"use_all_reduce_for_fetch_params": True},
        {"memory_efficient_linear": False, "stage3_param_persistence_threshold": 300},
        {"stage3_module_granularity_threshold": 2000, "log_trace_cache_warnings": True, "enable_sanity_checks": True},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_options_of_stage_3_do_not_change_what_is_learned(on_ranks, options):
    assert on_ranks(2, options_of_stage_3, options)[0] == pytest.approx(train(local_engine(), range(2)), rel=1e-6)


def speaking_options() -> list[float]:
    options = {
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "steps_per_print": 1,
        "flops_profiler": {"enabled": True, "profile_step": 1},
        "comms_logger": {"enabled": True},
    }
    return [run(stage, 3, {"options": options}, {})[1][-1] for stage in (1, 3)]


@pytest.mark.slow
def test_deepspeeds_own_measurements_run_with_our_updates(on_ranks):
    expected = train(local_engine(), range(3))[-1]
    assert on_ranks(2, speaking_options)[0] == pytest.approx([expected] * 2, rel=1e-6)


# ----------------------------------------------------------------------------------------------------- weights and state
def save_and_continue(stage: int, other_stage: int, dtype: str, optimizer: str) -> tuple[bool, bool]:
    """Whether weights come back with the same bits, and whether an engine that got weights and state goes on alike."""
    ranks = Collectives()
    place = {"rank": ranks.rank, "size": ranks.size}
    with zero_engine(stage, dtype=dtype, optimizer=optimizer) as engine:
        train(engine, range(2), **place)
        saved = whole_weights(engine)
        state = {name: part.values.clone() for name, part in engine.optimizer_parts().items()}
        expected = train(engine, range(2, 4), **place)
    for name, weight in saved.items():  # as a file would give them to every rank
        if ranks.rank:
            saved[name] = torch.empty(dict(engine.weight_layout())[name][1], dtype=weight.dtype)
        ranks.broadcast_(saved[name])
    with zero_engine(
        other_stage, dtype=dtype, optimizer=optimizer, options={}
    ) as other:  # at stage 3 copies of these small weights stay gathered
        train(other, range(1), **place)
        other.load_weights(saved.__getitem__, list(saved))
        after = whole_weights(other)
        same_bits = ranks.rank > 0 or all(torch.equal(after[name], weight) for name, weight in saved.items())
        if stage == other_stage:
            for name, part in other.optimizer_parts().items():
                part.values.copy_(state[name])
            return same_bits, train(other, range(2, 4), **place) == expected
        return same_bits, True


@pytest.mark.parametrize(
    ("ranks", "stage", "other_stage", "dtype", "optimizer"),
    [
        (2, 0, 0, "fp32", "adamw"),
        (2, 0, 0, "bf16", "history"),
        (2, 1, 1, "bf16", "adamw"),
        (2, 1, 1, "fp32", "diagonal"),
        (2, 2, 2, "fp32", "adamw"),
        (2, 2, 2, "bf16", "diagonal"),
        (2, 3, 3, "fp32", "history"),
        (2, 3, 3, "bf16", "diagonal"),
        (2, 1, 3, "fp32", "adamw"),
        (2, 3, 1, "bf16", "adamw"),
        (1, 3, 3, "bf16", "adamw"),
        (1, 3, 0, "fp32", "adamw"),
    ],
)
def test_weights_and_state_that_were_read_go_on_as_before(on_ranks, ranks, stage, other_stage, dtype, optimizer):
    assert on_ranks(ranks, save_and_continue, stage, other_stage, dtype, optimizer) == [(True, True)] * ranks


def load_misfits(stage: int) -> str:
    with zero_engine(stage) as engine:
        saved = {name: torch.zeros(shape) for name, (_, shape) in engine.weight_layout().items()}
        saved["stranger"] = saved.pop("model.norm.weight")
        saved["model.embed_tokens.weight"] = torch.zeros(2, 2)
        with pytest.raises(ValueError, match="do not fit") as error:
            engine.load_weights(saved.__getitem__, list(saved))
        return str(error.value)


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_that_do_not_fit_are_all_named(on_ranks, stage):
    message = on_ranks(2, load_misfits, stage)[1]
    assert "missing: model.norm.weight" in message
    assert "unknown: stranger" in message
    assert "model.embed_tokens.weight: (2, 2) in the file, (61, 16) in the model" in message


def bytes_of(stage: int) -> tuple[dict[str, int], int]:
    with zero_engine(stage) as engine:
        train(engine, range(1), rank=Collectives().rank, size=Collectives().size)
        return engine.state_bytes(), sum(shape.numel() for _, shape in engine.weight_layout().values())


def test_ranks_divide_state_from_stage_1_and_weights_at_stage_3(on_ranks):
    for stage in STAGES:
        for sizes, numel in on_ranks(2, bytes_of, stage):
            assert sizes["weights"] == 4 * numel // (2 if stage == 3 else 1)  # every weight here divides by 2
            assert sizes["moments"] == 2 * 4 * numel // (2 if stage else 1)


def bytes_sent() -> list[dict[str, int]]:
    ranks = Collectives()
    with zero_engine(3, options={"zero_optimization": {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}}) as engine:
        train(engine, range(2), rank=ranks.rank, size=ranks.size)  # DeepSpeed has then seen the order of the modules
        counts = [engine.communication()]
        train(engine, range(2, 3), rank=ranks.rank, size=ranks.size)
        return [*counts, engine.communication(), engine.communication()]


def test_bytes_of_gathered_weights_are_counted(on_ranks):
    _, of_one_update, none = on_ranks(2, bytes_sent)[0]
    assert none == {"updates": 0, "weights": 0}
    whole = sum(weight.nbytes for _, weight in local_engine().weights())
    assert of_one_update["updates"] > 0
    # Small weights, all of them here, are gathered once after each update: half of the bytes go from each of two ranks.
    assert of_one_update["weights"] == whole // 2


# --------------------------------------------------------------------------------------- what goes wrong, and cleaning up
def skip(stage: int, apply: str, poison: str) -> tuple[bool, bool, float]:
    """Whether the update was applied, whether anything changed, and the loss of the next one. One rank alone has the poison."""
    ranks = Collectives()
    place = {"rank": ranks.rank, "size": ranks.size}
    with zero_engine(stage, apply=apply) as engine:
        train(engine, range(1), micro_batches=1, **place)
        before = {**whole_weights(engine), **{name: part.values.clone() for name, part in engine.optimizer_parts().items()}}
        engine.begin_update(lr_multiplier=1.0, loss_divisor=64.0, num_micro_batches=1)
        handle = None
        if ranks.rank == ranks.size - 1:
            lm = engine.model
            if poison == "loss":
                handle = lm.register_forward_hook(lambda module, args, output: output * math.nan)
            else:
                handle = lm.model.norm.register_full_backward_hook(lambda module, grads, outputs: (grads[0] * math.inf,))
        loss = engine.accumulate(inputs(rows(1).chunk(ranks.size)[ranks.rank]))
        applied = engine.finish_update(loss / 64.0).applied
        if handle is not None:
            handle.remove()
        after = {**whole_weights(engine), **{name: part.values for name, part in engine.optimizer_parts().items()}}
        unchanged = all(torch.equal(after[name], value) for name, value in before.items())
        return applied, unchanged, train(engine, range(1, 2), micro_batches=1, **place)[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("apply", "poison"), [("deferred", "loss"), ("deferred", "gradient"), ("immediate", "loss")])
def test_all_ranks_skip_an_update_that_is_not_finite_on_one(on_ranks, stage, apply, poison):
    """NaN in the loss or a gradient of one rank, ZeRO 0 to 3, deferred and immediate | skipped on all; weights and state keep every bit"""
    expected = train(local_engine(), range(2), micro_batches=1)[1]
    for applied, unchanged, loss in on_ranks(2, skip, stage, apply, poison):
        assert not applied
        assert unchanged
        assert loss == pytest.approx(expected, rel=1e-6)


def traces(stage: int) -> list[str]:
    """What an engine leaves behind in the process."""
    from deepspeed.runtime.zero import parameter_offload

    linear, new = torch.nn.functional.linear, torch.Tensor.__new__
    stack = len(parameter_offload.FWD_MODULE_STACK)
    with zero_engine(stage) as engine:
        train(engine, range(1), rank=Collectives().rank, size=Collectives().size)
        model = engine.model
        parameter = next(model.parameters())
        left = weakref.ref(engine)
    del engine
    gc.collect()
    found = {
        "the engine is alive": left() is not None,
        "F.linear is DeepSpeed's": torch.nn.functional.linear is not linear,
        "Tensor.__new__ is DeepSpeed's": torch.Tensor.__new__ is not new,
        "a module on the stack": len(parameter_offload.FWD_MODULE_STACK) != stack,
        "hooks of modules": any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()),
        "hooks of gradients": bool(parameter._post_accumulate_grad_hooks),
    }
    return [what for what, is_there in found.items() if is_there]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_closed_engine_leaves_nothing_behind(on_ranks, stage):
    assert on_ranks(2, traces, stage) == [[], []]


def chatter(stage: int) -> tuple[str, list[str]]:
    """What an engine and the programs that it starts print, and its warnings."""
    import deepspeed

    vars(deepspeed.ops).pop("__compatible_ops__", None)  # what an earlier engine of this process knows
    sys.stdout.flush()
    with tempfile.TemporaryFile() as out, warnings.catch_warnings(record=True) as caught:
        before = [os.dup(descriptor) for descriptor in (1, 2)]
        try:
            for descriptor in (1, 2):
                os.dup2(out.fileno(), descriptor)
            run(stage, 2, {}, {"evaluates": True})
            sys.stdout.flush()
        finally:
            for descriptor, old in zip((1, 2), before, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
        out.seek(0)
        return out.read().decode(), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_says_nothing_unasked(on_ranks, stage):
    assert on_ranks(2, chatter, stage) == [("", [])] * 2


# ------------------------------------------------------------------------------------------------------------ the contract
def test_the_installed_deepspeed_is_what_the_engine_expects():
    check_deepspeed()


def test_what_moved_in_deepspeed_is_named(monkeypatch):
    """A name of DeepSpeed's that this project relies on has moved | named when the engine starts"""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    monkeypatch.delattr(DeepSpeedEngine, "_configure_zero_optimizer")
    monkeypatch.setattr(DeepSpeedEngine, "allreduce_gradients", lambda self: None)
    monkeypatch.setattr(Init, "_post_init_method", lambda self, module: None)
    with pytest.raises(UnknownDeepSpeed) as error:
        check_deepspeed()
    message = str(error.value)
    assert "DeepSpeedEngine._configure_zero_optimizer: gone" in message
    assert "DeepSpeedEngine.allreduce_gradients: takes no bucket_size any more" in message
    assert "Init._post_init_method: uses no _zero_init_param any more" in message
    assert "0.19.3 to 0.19.8" in message
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("version", ["0.19.2", "0.20.0", "1.0"])
def test_another_minor_version_is_refused(version):
    """Another minor version of DeepSpeed | refused"""

    def load(name: str) -> ModuleType:
        found: Any = __import__(name, fromlist=["_"])
        return SimpleNamespace(__version__=version) if name == "deepspeed" else found  # type: ignore[return-value]

    with pytest.raises(UnknownDeepSpeed, match=f"DeepSpeed {version} .*pip install 'deepspeed>=0.19.3,<0.20'"):
        check_deepspeed(load)


def test_a_missing_deepspeed_says_how_to_get_it():
    def load(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    with pytest.raises(UnknownDeepSpeed, match="pip install"):
        check_deepspeed(load)


def test_the_engine_passes_every_option_of_partitioning_on():
    """What DeepSpeed's own call gives to DeepSpeedZeRoOffload and ours does not would silently be a default."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    from ngpt.engine import deepspeed_engine

    own = inspect.getsource(deepspeed_engine._offload)
    theirs = inspect.getsource(DeepSpeedEngine._configure_zero_optimizer)
    passed = [name for name in inspect.signature(DeepSpeedZeRoOffload.__init__).parameters if f"{name}=" in theirs]
    refused = {
        "mpu",
        "zero_param_parallel_group",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "dp_process_group",
        "zenflow",
    }
    assert [name for name in passed if f"{name}=" not in own and name not in refused] == []
