"""How many bytes of state a parameter will have, from its shape and settings alone: arithmetic without tensors, for models of any size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from ngpt.optim.hyper_parameters import complete_parts
from ngpt.optim.quantization import code_shapes

KINDS = ("basis", "moments", "fisher", "master", "other")
COUNTER = 8  # bytes of an int64
FP32, FP64 = 4, 8
STORED_MOMENTS = {"adam": 2, "adafactor": 1, "momentum": 1}  # of the size of the projected gradient
DEFAULTS = {
    "state_dtype": "fp32",
    "rounding": "stochastic",
    "proj_type": "std",
    "fisher": "none",
    "history": None,
    "moments": None,
    "complement": None,
    "min_rank": None,
    "on_refresh": "rotate",
    "converged_below": 0.0,
}


def expected_state_bytes(shape: Sequence[int], settings: Mapping[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of state of one parameter by kind, with their total, as `state_bytes` counts them.

    Args:
        shape: of the parameter; a matrix if `settings` has a `rank`.
        settings: a group of an optimizer, or some of its keys: `DEFAULTS` stand for what is missing (GaLore with fp32 moments).
        dtype: of the parameter.

    Raises ValueError if the settings do not go together.
    """
    settings = {**DEFAULTS, **settings}
    if "rank" in settings:
        sizes = _projected(shape, complete_parts(settings, {}, "settings"), dtype)
    else:
        sizes = {"moments": 2 * _moment_bytes(prod(shape), settings["state_dtype"], dtype), "other": COUNTER}
    if settings["rounding"] == "master" and dtype != _arithmetic(dtype):
        sizes["master"] = FP32 * prod(shape)
    return _with_total(sizes)


def expected_total(parameters: Iterable[tuple[Sequence[int], Mapping[str, Any]]], dtype: torch.dtype) -> dict[str, int]:
    """The sum of `expected_state_bytes` over the (shape, settings) of many parameters of one dtype."""
    each = [expected_state_bytes(shape, settings, dtype) for shape, settings in parameters]
    return _with_total({kind: sum(sizes[kind] for sizes in each) for kind in KINDS})


def _projected(shape: Sequence[int], settings: Mapping[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """The table of docs/math.md: a short side, b long side, r rank, c columns of the projected gradient, w and x bytes of a number."""
    (a, b), w, x = sorted(shape), dtype.itemsize, _arithmetic(dtype).itemsize
    r = a if settings["rank"] == "full" else settings["rank"]
    s, two_sided = settings["history"] or 0, settings["proj_type"] == "full"
    c = r if two_sided else b
    fisher = {
        "none": 0,
        "history": w * s * r * c + FP64 * s * s,
        "two_sided": w * s * r * c + FP64 * s * s,
        "factored": (x + (FP32 if dtype == torch.float16 else w)) * r * (r + 1) // 2,
        "diagonal": x * (a + b),
    }
    moments = STORED_MOMENTS[settings["moments"]] * _moment_bytes(r * c, settings["state_dtype"], dtype)
    factors = x * (r + c) if settings["moments"] == "adafactor" else 0
    adapting_rank = COUNTER + 2 * x if settings["min_rank"] is not None else 0
    limited_growth = x if settings["complement"] != "none" or settings["fisher"] == "diagonal" else 0
    return {
        "basis": 0 if settings["rank"] == "full" else w * r * (a + b if two_sided else a),
        "moments": moments + factors,
        "fisher": fisher[settings["fisher"]],
        "other": 3 * COUNTER + adapting_rank + limited_growth,
    }


def _moment_bytes(numel: int, state_dtype: str, dtype: torch.dtype) -> int:
    if state_dtype == "8bit":
        num_codes, num_scales = code_shapes(numel)
        return num_codes + FP32 * num_scales
    return numel * (torch.bfloat16 if state_dtype == "bf16" else _arithmetic(dtype)).itemsize


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _with_total(sizes: Mapping[str, int]) -> dict[str, int]:
    complete = {kind: sizes.get(kind, 0) for kind in KINDS}
    return complete | {"total": sum(complete.values())}
