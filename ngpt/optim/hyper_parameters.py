"""The rules for every hyper-parameter of a parameter group, checked before a group is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

SUBSPACES = ("svd", "randomized")
ON_REFRESH = ("rotate", "keep", "reset")
FISHERS = ("history", "none")
ROUNDINGS = ("stochastic", "nearest", "master")


def _number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):  # LR schedulers may be given the rate as a tensor
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(choices: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in choices), f"one of {', '.join(choices)}"


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda v: _number(v) and v >= 0, "a finite number >= 0"),
    "betas": (
        lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v),
        "two numbers in [0, 1)",
    ),
    "eps": (lambda v: _number(v) and v >= 0, "a finite number >= 0"),
    "weight_decay": (lambda v: _number(v) and v >= 0, "a finite number >= 0"),
    "rounding": _one_of(ROUNDINGS),
    "seed": (lambda v: _integer(v) and v >= 0, "an integer >= 0"),
    "rank": (lambda v: v == "full" or (_integer(v) and v >= 1), 'an integer >= 1, or "full" for no projection'),
    "update_proj_gap": (lambda v: _integer(v) and v >= 1, "an integer >= 1 (updates between refreshes of the basis)"),
    "scale": (lambda v: _number(v) and v > 0, "a finite number > 0"),
    "proj_type": (lambda v: v == "std", '"std" (the shorter side is projected)'),
    "subspace": _one_of(SUBSPACES),
    "on_refresh": _one_of(ON_REFRESH),
    "stagger": (lambda v: isinstance(v, bool), "True or False"),
    "fisher": _one_of(FISHERS),
    "history": (lambda v: _integer(v) and v >= 1, "an integer >= 1 (projected gradients kept per matrix)"),
    "damping": (lambda v: _number(v) and v > 0, "a finite number > 0"),
}
SCHEDULER_KEYS = frozenset({"initial_lr", "max_lr", "min_lr"})  # torch's LR schedulers keep these in the groups


def check_hyper_parameters(values: Mapping[str, Any], accepted: Iterable[str], where: str) -> None:
    """Raises ValueError naming `where` (the group), key, value and rule for the first value that breaks its rule or is not accepted."""
    accepted = sorted(accepted)
    for key, value in values.items():
        if key not in accepted:
            raise ValueError(f"{where}: unknown key {key!r} (value {value!r}); accepted keys: {', '.join(accepted)}")
        holds, rule = RULES[key]
        if not holds(value):
            raise ValueError(f"{where}: {key} = {value!r}, but it must be {rule}")


def check_matrix(parameter: torch.Tensor, rank: int | str, where: str) -> None:
    """Raises ValueError if a parameter of a projected group is not a matrix, or too small for the rank."""
    shape = tuple(parameter.shape)
    if parameter.ndim != 2:
        raise ValueError(f"{where} has shape {shape}, but a group with `rank` takes matrices only; put it in a group without `rank`")
    if isinstance(rank, int) and rank >= min(shape):
        raise ValueError(
            f"{where} has shape {shape}: rank = {rank} must be below its shorter side {min(shape)}; "
            'take a smaller rank, put it in a group without `rank`, or say rank="full" for no projection'
        )
