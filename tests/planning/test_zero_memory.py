"""Buffers and temporaries under ZeRO, by hand: two ranks, one layer of a 4 x 6 matrix, of rank 2 where it is projected, and a norm of 4."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from ngpt.engine.zero_cost import Setup
from ngpt.planning.parameters import Parameter
from ngpt.planning.update_memory import ROUNDED, Arithmetic, apply_bytes, search_bytes
from ngpt.planning.zero_memory import LayerUpdate, Wire, gathered_weight_bytes, keeps_matrices

PLAIN: dict[str, Any] = {"state_dtype": "fp32", "rounding": "stochastic"}
NORM = Parameter("norm", (4,), PLAIN)
WHOLE = [Parameter("matrix", (4, 6), PLAIN), NORM]
THIN = [Parameter("matrix", (4, 6), {**PLAIN, "rank": 2, "fisher": "none", "subspace": "svd"}), NORM]
DIAGONAL = [Parameter("matrix", (4, 6), {**PLAIN, "rank": 2, "fisher": "diagonal", "moments": "momentum", "subspace": "randomized"})]
FP32 = Setup(stage=1, ranks=2, dtype=torch.float32)
BF16 = dataclasses.replace(FP32, dtype=torch.bfloat16)


def test_a_sum_is_packed_for_all_ranks_and_comes_back_as_a_part_with_a_count_for_each_parameter() -> None:
    gloo, nccl = Wire(FP32, gloo=True), Wire(FP32, gloo=False)
    own = 4 * (12 + 2 + 2)
    assert gloo.own(WHOLE) == own
    assert gloo.arriving(WHOLE, first=True) == 2 * own
    assert (gloo.starting(WHOLE), nccl.starting(WHOLE)) == (4 * own, 3 * own)
    assert (gloo.flying(WHOLE), nccl.flying(WHOLE)) == (4 * own, 3 * own)
    assert (gloo.collected(WHOLE), nccl.collected(WHOLE)) == (5 * own, 3 * own)


def test_projected_gradients_are_joined_with_the_others_and_full_ones_wait_for_a_basis() -> None:
    wire = Wire(FP32, gloo=True)
    own = 4 * (2 * 3 + 2 + 2)
    assert wire.own(THIN) == own
    room = 2 * 4 * (2 + 2)
    assert wire.arriving(THIN, first=True) == room + 4 * 24
    assert wire.arriving(THIN, first=False) == room + 4 * 2 * 6
    assert wire.starting(THIN) == 2 * own + 4 * own


def test_micro_batches_are_added_up_in_fp32_below_stage_2_and_rounded_for_the_wire() -> None:
    several = dataclasses.replace(BF16, micro_batches=2)
    wire, numel = Wire(several, gloo=True), 12 + 2 + 2
    assert wire.arriving(WHOLE, first=True) == 2 * 4 * numel
    assert wire.starting(WHOLE) == 2 * 4 * numel + 2 * 2 * 2 * numel
    assert Wire(dataclasses.replace(several, stage=2), gloo=True).arriving(WHOLE, first=True) == 2 * 2 * numel


def test_at_stage_0_the_sum_needs_no_second_buffer() -> None:
    wire, own = Wire(dataclasses.replace(FP32, stage=0), gloo=True), 4 * (24 + 4 + 2)
    assert (wire.own(WHOLE), wire.starting(WHOLE), wire.flying(WHOLE), wire.collected(WHOLE)) == (own,) * 4


def test_layers_that_keep_matrices_are_told_from_those_that_keep_norms() -> None:
    assert keeps_matrices(WHOLE)
    assert keeps_matrices(DIAGONAL)
    assert not keeps_matrices(THIN)
    assert not keeps_matrices([NORM])


def test_small_weights_are_copied_joined_and_gathered_after_an_update_and_large_ones_where_they_lie() -> None:
    def applied(setup: Setup, layer: list[Parameter]) -> int:
        return LayerUpdate(setup, Arithmetic(setup.dtype, on_gpu=False)).applied(layer)

    assert applied(FP32, WHOLE) == 4 * (12 + 2) * (2 + 2)
    assert applied(dataclasses.replace(FP32, stage=2), WHOLE) == 4 * (12 + 2) * (2 + 2)
    large = [Parameter("matrix", (1024, 1024), PLAIN)]
    pieces = apply_bytes(Parameter("slice", (2**19,), PLAIN), Arithmetic(torch.float32, on_gpu=False))
    assert applied(FP32, large) == pieces
    for stage in (0, 3):
        assert applied(dataclasses.replace(FP32, stage=stage), WHOLE) < 4 * (12 + 2) * (2 + 2)


def test_the_updates_of_a_layer_are_side_by_side() -> None:
    for layer, setup in ((DIAGONAL, FP32), (DIAGONAL, dataclasses.replace(FP32, stage=0)), (DIAGONAL, dataclasses.replace(FP32, stage=3))):
        updates = LayerUpdate(setup, Arithmetic(setup.dtype, on_gpu=False))
        one, four = updates.applied(layer), updates.applied(layer * 4)
        held = 4 * 24 // setup.parts  # the changes of the three others, at least
        assert four - one >= 3 * held
    on_cpu = Arithmetic(torch.float32, on_gpu=False)
    # Changes, slices of them; weights' slices, joined, gathered: 12 numbers, the last 24; and three times the direction's 6.
    assert LayerUpdate(FP32, on_cpu).applied(DIAGONAL) == 4 * (6 * 12 + 3 * 6)
    # Changes, columns of them, by receivers, joined, received: 12 numbers each, and three times the direction's 6.
    exchanged = 4 * (5 * 12 + 3 * 6)
    assert LayerUpdate(dataclasses.replace(FP32, stage=3), Arithmetic(torch.float32, on_gpu=False)).applied(DIAGONAL) == exchanged
    # In bf16: a widened weight and its rounding beside changes and their slices.
    in_bf16 = LayerUpdate(dataclasses.replace(BF16, stage=3), Arithmetic(torch.bfloat16, on_gpu=False))
    assert in_bf16.applied(DIAGONAL) == 12 * (4 + 4 + 4 + ROUNDED) + 3 * 4 * 6


def test_a_search_in_columns_gathers_all_of_them() -> None:
    staggered = [Parameter("matrix", (4, 6), {**(DIAGONAL[0].settings or {}), "stagger": True})]
    on_cpu = Arithmetic(torch.float32, on_gpu=False)
    applied = LayerUpdate(dataclasses.replace(FP32, stage=3), on_cpu).applied(staggered)
    assert applied == 4 * 24 + search_bytes(staggered[0], on_cpu) + 3 * 4 * 6


def test_stage_3_has_gathered_what_it_may_and_fetches_some_ahead() -> None:
    def gathered(stage: int, **options: int) -> tuple[int, int]:
        config: Any = SimpleNamespace(engine=SimpleNamespace(deepspeed={"zero_optimization": options}))
        return gathered_weight_bytes(config, WHOLE, dataclasses.replace(BF16, stage=stage))

    assert gathered(2) == (0, 0)
    assert gathered(3) == (2 * 28, 2 * 28)
    assert gathered(3, stage3_max_live_parameters=20, stage3_prefetch_bucket_size=10) == (2 * 20, 2 * 10)


def test_directions_are_gathered_and_lifted_on_every_rank() -> None:
    updates = LayerUpdate(FP32, Arithmetic(torch.float32, on_gpu=False))
    one, three = updates.applied(THIN[:1]), updates.applied(THIN[:1] * 3)
    assert three - one == 2 * (4 * 6 + 4 * 12)  # of each other one: its own columns and, gathered, those of all
    assert updates.applied(THIN[:1] * 41) - updates.applied(THIN[:1] * 40) == 4 * 6 + 4 * 6 + (4 + 4) * 12  # sent, gathered, as columns
    in_bf16 = LayerUpdate(BF16, Arithmetic(torch.bfloat16, on_gpu=False))
    assert in_bf16.search(THIN * 41) - in_bf16.search(THIN * 40) == 4 * (24 + 24)  # widened, joined
    assert updates.search(THIN * 2) - updates.search(THIN) == 4 * (24 + 4 * 4)
