"""Temporaries of an update: the most bytes that reducing one gradient, finding its subspace or applying it takes for a moment.

Each formula follows the operations of `ngpt.optim`, of which those that live at one time are added up. Letters: n numbers of a parameter,
a short side, b long side, r rank, c columns of the projected gradient, s width of a search (r + OVERSAMPLING), e numbers of a piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ngpt.engine.zero_cost import keeps_full_gradient
from ngpt.optim.hyper_parameters import complete_parts
from ngpt.optim.projection import OVERSAMPLING
from ngpt.optim.state_cost import DEFAULTS
from ngpt.optim.storage import PIECE_ELEMENTS, PIECE_ELEMENTS_ELSEWHERE
from ngpt.planning.parameters import Parameter

FP32, FP64 = 4, 8
ROUNDED = 9  # bytes a number while it is rounded stochastically: random bits, a masked copy, a comparison


@dataclass(frozen=True)
class Arithmetic:
    """Where and how updates are computed.

    Args:
        dtype: of the weights.
        on_gpu: pieces are larger there.
        guarded: inside backward, where a gradient that is not finite must leave no trace.
    """

    dtype: torch.dtype
    on_gpu: bool
    guarded: bool = False

    @property
    def w(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def piece(self) -> int:
        """Numbers of a large parameter that are updated at one time."""
        return PIECE_ELEMENTS_ELSEWHERE if self.on_gpu else PIECE_ELEMENTS["cpu"]


def kept_gradient_bytes(parameter: Parameter, arithmetic: Arithmetic, *, apply: str, micro_batches: int) -> int:
    """Bytes of a parameter's gradient between backward and update, on one process (`ngpt.optim.per_layer_hook`)."""
    if parameter.settings is None or apply == "immediate":
        return 0
    if apply == "whole":
        return arithmetic.w * parameter.numel
    if keeps_full_gradient(parameter.settings):
        return (FP32 if micro_batches > 1 else arithmetic.w) * parameter.numel
    return FP32 * low_numel(parameter)


def reduce_bytes(parameter: Parameter, arithmetic: Arithmetic, *, first: bool = True) -> int:
    """While a full gradient is reduced inside backward: in the `first` micro-batch, the search for a subspace as well."""
    if parameter.settings is None or keeps_full_gradient(parameter.settings):
        return 0
    widened = 0 if arithmetic.on_gpu or arithmetic.w == FP32 else FP32 * parameter.numel  # for the norm
    projected = max((FP32 + arithmetic.w) * low_numel(parameter), widened + FP32 * low_numel(parameter))
    return max(projected, search_bytes(parameter, arithmetic)) if first else projected


def apply_bytes(parameter: Parameter, arithmetic: Arithmetic) -> int:
    """While a reduced gradient is applied."""
    if parameter.settings is None:
        return 0
    if "rank" not in parameter.settings:
        return _piece_bytes(parameter, arithmetic)
    settings, n, low, w = _completed(parameter.settings), parameter.numel, low_numel(parameter), arithmetic.w
    narrow = w < FP32
    moments = _moment_temporaries(settings, low, arithmetic)
    keeps_master = settings["rounding"] == "master" and narrow
    weight = (0 if keeps_master else FP32 * n) if narrow else 0  # the widened weight
    rounding = ROUNDED * n if narrow and settings["rounding"] == "stochastic" else 0
    guard = w * n if arithmetic.guarded else 0
    lifted = w * n if narrow and settings["rank"] != "full" else 0  # the product P L, before it is added in fp32
    history = 2 * FP64 * low + FP64 * min(arithmetic.piece, settings["history"] * low) if settings["history"] else 0
    if settings["fisher"] == "diagonal":
        squares = FP32 * n + (FP32 * n if narrow else 0)
        state = max(squares + FP32 * low, FP32 * n + lifted + 5 * FP32 * low)
        changed = FP32 * n + weight + guard + max(rounding, guard)
    else:
        full = FP32 * n if settings["complement"] == "fira" and narrow else 0
        state = 3 * FP32 * low + moments + history
        changed = FP32 * low + weight + guard + max(lifted + full, rounding, guard)
    found = search_bytes(parameter, arithmetic) if keeps_full_gradient(parameter.settings) else 0
    rotated = 6 * FP32 * low if settings["on_refresh"] == "rotate" else 0
    return max(state, changed, found, rotated)


def together_bytes(parameters: Iterable[Parameter], arithmetic: Arithmetic) -> int:
    """While AdamW updates all of its small parameters at once, as it does under `apply=whole`: one array of their size."""
    small = [
        parameter.numel
        for parameter in parameters
        if parameter.settings is not None
        and "rank" not in parameter.settings
        and parameter.numel <= arithmetic.piece
        and arithmetic.dtype == torch.float32
        and parameter.settings["state_dtype"] == "fp32"
    ]
    return FP32 * sum(small)


def _piece_bytes(parameter: Parameter, arithmetic: Arithmetic) -> int:
    """AdamW on some rows of a parameter."""
    assert parameter.settings is not None
    width = prod(parameter.shape[1:])
    e = min(parameter.numel, max(1, arithmetic.piece // width) * width)
    settings, narrow = parameter.settings, arithmetic.w < FP32
    copies = FP32 if narrow and settings["rounding"] != "master" else 0
    copies += 2 * FP32 if settings["state_dtype"] != "fp32" else 0
    gradient = FP32 if narrow else 0
    rounds = (narrow and settings["rounding"] == "stochastic") or settings["state_dtype"] == "bf16"
    stored = {True: ROUNDED, False: 0}[rounds] if settings["state_dtype"] != "8bit" else 6 * FP32
    guard = 2 * FP32 + arithmetic.w if arithmetic.guarded else 0
    return e * (copies + guard + max(gradient + FP32, stored))


def _moment_temporaries(settings: dict[str, Any], low: int, arithmetic: Arithmetic) -> int:
    e = min(low, arithmetic.piece)
    if settings["state_dtype"] == "fp32":
        return FP32 * e if arithmetic.guarded else 0
    return e * (2 * FP32 + (ROUNDED if settings["state_dtype"] == "bf16" else 6 * FP32))


def search_bytes(parameter: Parameter, arithmetic: Arithmetic) -> int:
    """Finding a subspace: the gradient at size one, and what its factorisation takes beside it."""
    assert parameter.settings is not None
    settings, n = _completed(parameter.settings), parameter.numel
    if settings["rank"] == "full":
        return 0
    (short, long), rank = sorted(parameter.shape), settings["rank"]
    wide = FP32 * n if arithmetic.w < FP32 else 0
    at_size_one = 2 * FP32 * n
    if settings["subspace"] == "svd":
        # A copy by columns, singular vectors of both sides; on a GPU the solver's room is the allocator's as well.
        room = FP32 * (4 * short * short + 7 * short) if arithmetic.on_gpu else 0
        return wide + FP32 * n + FP32 * (2 * n + short * short) + room
    width = min(rank + OVERSAMPLING, short)
    if settings["subspace"] == "random":
        return wide + max(at_size_one, FP32 * n + FP64 * 3 * short * rank + FP32 * rank * long)
    return wide + max(at_size_one, FP32 * n + (3 * FP64 + FP32) * width * long + FP32 * width * short)


def low_numel(parameter: Parameter) -> int:
    assert parameter.settings is not None
    settings = parameter.settings
    rank = min(parameter.shape) if settings["rank"] == "full" else settings["rank"]
    return rank * (rank if settings.get("proj_type") == "full" else max(parameter.shape))


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    return complete_parts({**DEFAULTS, "subspace": "svd", "update_proj_gap": 200, **settings}, {}, "settings")
