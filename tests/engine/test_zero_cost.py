"""What ZeRO is said to cost is what it costs: bytes sent and bytes of state, measured on 1 to 4 ranks; and the targets for the wire."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.optimizer_memory import RANKS
from bench.presets import block_shapes, model_of
from ngpt.config.schema import ModelConfig
from ngpt.dist.collectives import Collectives
from ngpt.engine.deepspeed_config import deepspeed_config
from ngpt.engine.zero_cost import (
    Setup,
    average_bytes_sent,
    buffer_bytes,
    bytes_sent,
    gradient_bytes,
    keeps_full_gradient,
    memory_per_rank,
    sharded_state_bytes,
    state_bytes_on_rank,
    textbook_adamw_bytes,
    weight_gather_bytes,
)
from ngpt.engine.zero_sharding import ShardedUpdates, ZeroSharding
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import AdaRankGrad, GaLore, NaturalGaLore, low_rank_groups, projection, state_bytes
from ngpt.optim.state_cost import KINDS

GAP, STEPS = 3, 4  # updates 0 and 3 refresh
PLAIN = {"embed": (21, 12), "layers.0.norm": (12,), "layers.1.norm": (12,), "head": (21, 12)}
PROJECTED = {
    f"layers.{number}.{name}": shape for number in range(2) for name, shape in (("up", (17, 12)), ("down", (12, 17)), ("sq", (12, 12)))
}
LAYERS = [["head"], *([f"layers.{number}.{name}" for name in ("norm", "up", "down", "sq")] for number in (1, 0)), ["embed"]]

METHODS: dict[str, dict[str, Any] | None] = {
    "adamw": None,
    "galore": {"on_refresh": "keep"},
    "galore, random": {"subspace": "random"},
    "galore, two-sided": {"proj_type": "full"},
    "galore, two-sided, randomized": {"proj_type": "full", "subspace": "randomized", "moments": "adafactor"},
    "galore, adafactor": {"moments": "adafactor"},
    "galore, momentum": {"moments": "momentum", "subspace": "randomized"},
    "fira": {"complement": "fira"},
    "fira, randomized, reset": {"complement": "fira", "subspace": "randomized", "on_refresh": "reset"},
    "natural, history": {"fisher": "history", "history": 3, "subspace": "randomized"},
    "natural, two-sided": {"fisher": "two_sided", "history": 3, "subspace": "randomized"},
    "natural, factored": {"fisher": "factored", "subspace": "randomized"},
    "natural, diagonal": {"fisher": "diagonal", "subspace": "randomized"},
    "natural, diagonal, random": {"fisher": "diagonal", "subspace": "random"},
    "natural, diagonal, full rank": {"fisher": "diagonal", "rank": "full"},
    "natural, history, full rank": {"fisher": "history", "history": 3, "rank": "full"},
    "adaptive rank": {"min_rank": 2, "energy": 1.0},  # so it keeps all of the rank
}
FEW = ["adamw", "galore", "galore, two-sided", "fira", "natural, history", "natural, factored", "natural, diagonal"]


def settings_of(method: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of plain parameters, and of projected ones."""
    own = METHODS[method]
    projected = {"rank": 4, "update_proj_gap": GAP, "subspace": "svd", "on_refresh": "rotate", "stagger": False}
    return dict(options), dict(options) if own is None else {**projected, **options, **own}


def layers_of(method: str, options: Mapping[str, Any]) -> list[list[tuple[tuple[int, ...], dict[str, Any]]]]:
    plain, projected = settings_of(method, options)
    shapes = {**PLAIN, **PROJECTED}
    return [[(shapes[name], projected if name in PROJECTED else plain) for name in layer] for layer in LAYERS]


class Slices:
    """Weights of which each rank has a flat slice."""

    def __init__(self, parameters: Mapping[str, Tensor], ranks: Collectives) -> None:
        self._slices = {p: p.detach().reshape(-1).split(-(-p.numel() // ranks.size)) for p in parameters.values()}
        self._rank = ranks.rank

    def shape(self, p: Tensor) -> torch.Size:
        return p.shape

    def flat(self, p: Tensor) -> Tensor:
        slices = self._slices[p]
        return slices[self._rank] if self._rank < len(slices) else slices[0][:0]


def measure(
    method: str, stage: int, micro_batches: int, apply: str, dtype: torch.dtype, wire: torch.dtype | None, iterations: int, options: dict
) -> dict[str, Any]:
    """What each update of this rank has sent, its state, and gradients alive before the updates."""
    ranks = Collectives()
    torch.manual_seed(0)
    shapes = {**PLAIN, **PROJECTED}
    in_order = [name for layer in reversed(LAYERS) for name in layer]
    parameters = {name: nn.Parameter(torch.randn(shapes[name]).to(dtype)) for name in in_order}
    sharding = ZeroSharding(ranks, stage=stage, weights=Slices(parameters, ranks) if stage == 3 else None)
    plain, projected = settings_of(method, options)
    groups = [
        {"params": [(name, parameters[name]) for name in parameters if name in PLAIN], **plain},
        {"params": [(name, parameters[name]) for name in parameters if name in PROJECTED], **projected},
    ]
    kind = NaturalGaLore if "fisher" in projected else AdaRankGrad if "min_rank" in projected else GaLore
    optimizer = kind(groups, sharding=sharding)
    updates = ShardedUpdates(optimizer, parameters.values(), ranks, apply=apply, communication_dtype=wire)
    noise = torch.Generator().manual_seed(ranks.rank)
    settled, projection.SETTLED = projection.SETTLED, {1: 2.0, 3: -1.0}[iterations]  # always at once, or never
    sent, live, waiting = [], [], []
    try:
        for _ in range(STEPS):
            before = ranks.bytes_sent
            updates.begin_update(micro_batches)
            for _ in range(micro_batches):
                updates.begin_micro_batch()
                loss = torch.stack([(p * torch.randn(p.shape, generator=noise).to(dtype)).sum() for p in parameters.values()]).sum()
                if apply == "deferred" or updates.all_finite(loss.detach()):
                    loss.backward()
                updates.end_micro_batch()
            waiting.append(updates.live_bytes())
            updates.scalars(torch.zeros(()))
            live.append(updates.live_bytes())
            updates.step()
            sent.append(ranks.bytes_sent - before)
    finally:
        projection.SETTLED = settled
    return {"sent": sent, "state": state_bytes(optimizer), "live": live, "waiting": waiting}


def check(on_ranks: Callable[..., Any], method: str, size: int, stages: list[int], **how: Any) -> None:
    """Measured and expected are equal on every rank."""
    micro_batches, apply = how.pop("micro_batches", 1), how.pop("apply", "deferred")
    dtype, wire, iterations = how.pop("dtype", torch.float32), how.pop("wire", None), how.pop("iterations", 1)
    layers = layers_of(method, how)
    for stage in stages:
        for rank, found in enumerate(on_ranks(size, measure, method, stage, micro_batches, apply, dtype, wire, iterations, how)):
            setup = Setup(
                stage,
                size,
                dtype,
                rank=rank,
                wire=wire,
                micro_batches=micro_batches,
                immediate=apply == "immediate",
                iterations=iterations,
            )
            first = bytes_sent(layers, setup, refresh=True, rotates=False)["total"]
            between, later = (bytes_sent(layers, setup, refresh=refresh)["total"] for refresh in (False, True))
            assert found["sent"] == [first, between, between, later], f"stage {stage}, rank {rank}"
            state = [state_bytes_on_rank(shape, settings, setup) for layer in layers for shape, settings in layer]
            for kind in (*KINDS, "total"):
                assert found["state"][kind] == sum(sizes[kind] for sizes in state), f"{kind} at stage {stage} on rank {rank}"
            summed = Setup(**{**setup.__dict__, "micro_batches": 1}) if stage < 2 else setup
            kept = 0 if setup.immediate else sum(gradient_bytes(layer, summed) for layer in layers)
            assert found["live"] == [kept] * STEPS, f"gradients at stage {stage} on rank {rank}"
            if micro_batches == 1 and not setup.immediate:
                buffers = buffer_bytes(layers[-1:] if keeps_full_gradient(layers[1][1][1]) else layers[-2:], setup)
                of_gloo = buffers * (size - 1) // size  # what the other ranks have sent is added up here
                assert found["waiting"] == [kept + buffers + of_gloo] * STEPS, f"buffers at stage {stage} on rank {rank}"


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_send_and_keep_what_the_formulas_say(on_ranks: Callable[..., Any], method: str) -> None:
    check(on_ranks, method, 2, [0, 1, 2, 3])


@pytest.mark.parametrize("method", FEW)
def test_one_and_three_ranks_send_and_keep_what_the_formulas_say(on_ranks: Callable[..., Any], method: str) -> None:
    check(on_ranks, method, 1, [1, 3])
    check(on_ranks, method, 3, [0, 1, 3], micro_batches=2, iterations=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS if os.environ.get("NGPT_FULL") else ["adamw", "galore", "natural, history", "natural, diagonal"])
def test_four_ranks_send_and_keep_what_the_formulas_say(on_ranks: Callable[..., Any], method: str) -> None:
    check(on_ranks, method, 4, [0, 1, 2, 3])
    check(on_ranks, method, 4, [1, 2, 3], micro_batches=3, iterations=3)


@pytest.mark.parametrize("method", FEW)
def test_immediate_updates_in_bf16_send_and_keep_what_the_formulas_say(on_ranks: Callable[..., Any], method: str) -> None:
    check(on_ranks, method, 2, [0, 1, 3], apply="immediate", dtype=torch.bfloat16, rounding="master")


@pytest.mark.parametrize("method", FEW)
def test_gradients_on_the_wire_may_have_another_dtype_and_moments_fewer_bits(on_ranks: Callable[..., Any], method: str) -> None:
    check(on_ranks, method, 2, [1, 2], dtype=torch.bfloat16, wire=torch.float32, micro_batches=2, state_dtype="8bit")
    check(on_ranks, method, 3, [2], dtype=torch.float32, wire=torch.bfloat16, micro_batches=2, state_dtype="bf16")


def engine_bytes(stage: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of an update without a refresh that the engine reports, and those of the formulas, all weights partitioned."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ngpt.engine.deepspeed_engine import ZeroEngine

    ranks = Collectives()
    config = ModelConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    options = deepspeed_config(
        {"zero_optimization": zero} if stage == 3 else {}, zero_stage=stage, micro_batch_size=1, accumulation_steps=2, world_size=ranks.size
    )
    settings = {"fisher": "history", "history": 3, "subspace": "randomized", "on_refresh": "rotate"}

    def build_optimizer(model: nn.Module, sharding: Any) -> NaturalGaLore:
        groups = low_rank_groups(model, rank=4, shape_of=sharding.shape)
        return NaturalGaLore(groups, **settings, stagger=False, sharding=sharding)

    engine = ZeroEngine(
        lambda: LlamaForCausalLM(config), build_optimizer, options, zero_stage=stage, device=torch.device("cpu"), dtype=torch.float32,
        apply="deferred", grad_clip=0.0,
    )  # fmt: skip
    projected, block = {**settings, "rank": 4}, 2 * [((16,), {})]
    block = [*((shape, projected) for shape in block_shapes(config)), *block]
    layers = [[((61, 16), {})], [((16,), {})], block, block, [((61, 16), {})]]
    setup = Setup(stage, ranks.size, torch.float32, rank=ranks.rank, micro_batches=2)
    expected = {"updates": bytes_sent(layers, setup)["total"], "weights": weight_gather_bytes(layers, setup)}
    found = []
    try:
        for step in range(3):
            engine.begin_update(lr_multiplier=1.0, loss_divisor=32.0, num_micro_batches=2)
            tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(10 * step + ranks.rank))
            loss = torch.stack([engine.accumulate({"input_ids": row[None, :-1], "labels": row[None, 1:]}) for row in tokens]).sum()
            engine.finish_update(loss / 32.0)
            found.append(engine.communication())
    finally:
        engine.close()
    return found[2], expected  # DeepSpeed has seen the order of the modules, and bases are there


@pytest.mark.parametrize("stage", [1, 3])
def test_the_engine_reports_the_bytes_of_the_formulas(on_ranks: Callable[..., Any], stage: int) -> None:
    for found, expected in on_ranks(2, engine_bytes, stage):
        assert found == expected


# ------------------------------------------------------------------------------------------------------------------ targets
THIN = {
    "svd": {},
    "randomized": {"subspace": "randomized"},
    "history": {"fisher": "history", "history": 20, "subspace": "randomized"},
    "two-sided": {"fisher": "two_sided", "history": 20, "subspace": "randomized"},
    "adaptive rank": {"min_rank": 1},
}


def a_block(size: str, parts: Mapping[str, Any]) -> list[list[tuple[tuple[int, int], dict[str, Any]]]]:
    """The projected matrices of one block at the benchmark's rank."""
    return [[(shape, {"rank": RANKS[size], **parts}) for shape in block_shapes(model_of(size))]]


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("method", THIN)
def test_subspace_methods_send_the_share_of_the_rank_of_what_adamw_sends(method: str, size: str) -> None:
    block, share = a_block(size, THIN[method]), RANKS[size] / model_of(size).hidden_size
    for stage in (0, 1, 2):
        for ranks in (2, 3, 4, 8, 64):
            setup = Setup(stage, ranks)
            assert average_bytes_sent(block, setup)["total"] <= (share + 0.02) * textbook_adamw_bytes(block, setup), (stage, ranks)


@pytest.mark.parametrize("size", RANKS)
def test_full_space_methods_send_half_as_much_again_as_adamw(size: str) -> None:
    """The whole gradient and the weights, as AdamW; and the change in fp32 from columns to slices, which is 1/N of the matrix."""
    block = a_block(size, {"fisher": "diagonal", "subspace": "randomized"})
    for ranks in (2, 8, 64):
        setup = Setup(1, ranks)
        assert average_bytes_sent(block, setup)["total"] <= (1.02 + 1 / ranks) * textbook_adamw_bytes(block, setup)


def test_what_an_update_sends_is_split_by_purpose() -> None:
    """A 24 x 40 matrix, rank 4, by hand: bytes that one of two ranks sends, fp32."""
    layer = [[((24, 40), {"rank": 4, "subspace": "randomized", "fisher": "history", "history": 3, "update_proj_gap": 10})]]
    setup = Setup(1, 2, torch.float32)
    sums = 16 + 3 * 8  # loss and norm; inner products with the history
    low = 4 * 40 * 4 // 2
    expected = {"gradients": low + 4, "directions": low, "weights": 0, "exchange": 0, "sums": sums, "refresh": 0}
    assert bytes_sent(layer, setup) == expected | {"total": sum(expected.values())}
    search = 4 + 40 * 12 * 4 + 24 * 12 * 4 + 2 + 24 * 4 * 4 // 2  # the largest entry, Z, Y, whether to stop, the basis
    refreshing = bytes_sent(layer, setup, refresh=True)
    assert refreshing["refresh"] == search + 3 * 3 * 8
    assert average_bytes_sent(layer, setup)["refresh"] == refreshing["refresh"] / 10
    diagonal = [[((24, 40), {"rank": 4, "subspace": "randomized", "fisher": "diagonal"})]]
    sent = bytes_sent(diagonal, setup)
    assert (sent["gradients"], sent["weights"], sent["exchange"]) == (24 * 40 * 4 // 2 + 4, 24 * 40 * 4 // 2, 12 * 20 * 4)


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize(
    "parts", [{}, {"fisher": "history", "history": 4}, {"fisher": "factored"}, {"fisher": "diagonal"}, {"state_dtype": "8bit"}]
)
def test_state_that_is_divided_is_so_evenly(size: str, parts: dict[str, Any]) -> None:
    for shape, settings in a_block(size, parts)[0]:
        sharded = sharded_state_bytes(shape, settings, Setup(0, 1))
        whole = state_bytes_on_rank(shape, settings, Setup(0, 1))
        for ranks in (2, 3, 64, 1024):
            first = state_bytes_on_rank(shape, settings, Setup(2, ranks))
            share = first["total"] - (whole["total"] - sharded)
            assert sharded <= share * ranks
            assert share <= sharded / ranks + sharded / max(shape) + 2 * 4  # at most a column, and a scale of each moment, too many
            assert first["basis"] == whole["basis"]


def test_the_state_of_all_ranks_makes_the_whole() -> None:
    for settings in ({}, {"rank": 4}, {"rank": 4, "moments": "adafactor", "rounding": "master"}, {"rank": 4, "fisher": "diagonal"}):
        whole = state_bytes_on_rank((17, 12), settings, Setup(0, 1))["total"]
        sharded = sharded_state_bytes((17, 12), settings, Setup(0, 1))
        parts = [state_bytes_on_rank((17, 12), settings, Setup(1, 5, rank=rank))["total"] - (whole - sharded) for rank in range(5)]
        assert sum(parts) == sharded


def test_memory_falls_from_stage_to_stage() -> None:
    layers = [[((64, 96), {"rank": 16})] * 2, [((96,), {})]]
    by_stage = [memory_per_rank(layers, Setup(stage, 4, micro_batches=2)) for stage in range(4)]
    assert all(sizes["total"] == sum(size for kind, size in sizes.items() if kind != "total") for sizes in by_stage)
    assert by_stage[0]["state"] > by_stage[1]["state"] == by_stage[3]["state"]
    assert by_stage[1]["gradients"] == 4 * by_stage[2]["gradients"]
    assert by_stage[2]["weights"] == 4 * by_stage[3]["weights"]
    assert memory_per_rank(layers, Setup(1, 4, immediate=True))["gradients"] == 0
