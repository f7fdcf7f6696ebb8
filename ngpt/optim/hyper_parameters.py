"""The rules for every hyper-parameter of a parameter group, checked before a group is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ngpt.optim.complement import COMPLEMENTS
from ngpt.optim.moments import MOMENTS
from ngpt.optim.storage import STATE_DTYPES

SUBSPACES = ("svd", "randomized", "random")
ON_REFRESH = ("rotate", "keep", "reset")
FISHERS = ("history", "two_sided", "factored", "diagonal", "none")
ROUNDINGS = ("stochastic", "nearest", "master")
PROJ_TYPES = ("std", "full")
HISTORY = 20  # of Natural GaLore's paper


def _number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):  # LR schedulers may be given the rate as a tensor
        return value.numel() == 1 and not value.is_complex() and bool(value.isfinite())
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
    "state_dtype": _one_of(STATE_DTYPES),
    "rounding": _one_of(ROUNDINGS),
    "seed": (lambda v: _integer(v) and v >= 0, "an integer >= 0"),
    "rank": (lambda v: v == "full" or (_integer(v) and v >= 1), 'an integer >= 1, or "full" for no projection'),
    "update_proj_gap": (lambda v: _integer(v) and v >= 1, "an integer >= 1 (updates between refreshes of the basis)"),
    "scale": (lambda v: _number(v) and v > 0, "a finite number > 0"),
    "proj_type": (lambda v: v in PROJ_TYPES, '"std" (the shorter side is projected) or "full" (both are)'),
    "subspace": _one_of(SUBSPACES),
    "on_refresh": _one_of(ON_REFRESH),
    "stagger": (lambda v: isinstance(v, bool), "True or False"),
    "fisher": _one_of(FISHERS),
    "history": (lambda v: v is None or (_integer(v) and v >= 1), "an integer >= 1 (projected gradients kept per matrix), or None"),
    "damping": (lambda v: _number(v) and v > 0, "a finite number > 0"),
    "moments": (lambda v: v is None or v in MOMENTS, f"one of {', '.join(MOMENTS)}, or None for what goes with the Fisher"),
    "complement": (lambda v: v is None or v in COMPLEMENTS, f"one of {', '.join(COMPLEMENTS)}, or None for what goes with the Fisher"),
    "min_rank": (lambda v: v is None or (_integer(v) and v >= 1), "an integer >= 1 (smallest rank), or None for a fixed rank"),
    "energy": (lambda v: _number(v) and 0 < v <= 1, "a number in (0, 1] (share of the squared gradient that the rank keeps)"),
    "converged_below": (
        lambda v: _number(v) and 0 <= v < 1,
        "a number in [0, 1) (refresh when the projected gradient is below this share of its norm at the last refresh; 0: never)",
    ),
}
COMMON_KEYS = frozenset({"lr", "betas", "eps", "weight_decay", "state_dtype", "rounding", "seed"})
PROJECTION_KEYS = frozenset(RULES) - COMMON_KEYS - {"rank"}
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


def check_matrix(shape: Sequence[int], rank: int | str, where: str) -> None:
    """Raises ValueError if a parameter of a projected group is not a matrix, or too small for the rank."""
    shape = tuple(shape)
    if len(shape) != 2:
        raise ValueError(f"{where} has shape {shape}, but a group with `rank` takes matrices only; put it in a group without `rank`")
    if isinstance(rank, int) and rank >= min(shape):
        raise ValueError(
            f"{where} has shape {shape}: rank = {rank} must be below its shorter side {min(shape)}; "
            'take a smaller rank, put it in a group without `rank`, or say rank="full" for no projection'
        )


def complete_parts(group: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A projected group with the parts that its Fisher asks for.

    Raises ValueError naming `where`, key, value and rule if the parts do not go together.
    """
    settings = {**defaults, **group}
    rank, fisher = settings["rank"], settings["fisher"]
    projects = rank != "full"
    if fisher == "two_sided":
        settings["proj_type"] = "full"
    keeps_history = fisher in ("history", "two_sided")
    if settings["history"] is None and keeps_history:
        settings["history"] = HISTORY
    if settings["moments"] is None:
        settings["moments"] = "momentum" if fisher == "diagonal" else "adam"
    if settings["complement"] is None:
        settings["complement"] = "raw" if fisher == "diagonal" and projects else "none"
    moments, complement, two_sided = settings["moments"], settings["complement"], settings["proj_type"] == "full"
    rules = (
        (not two_sided or fisher in ("history", "two_sided", "none"), "proj_type", 'fisher "history", "two_sided" or "none"'),
        (not two_sided or projects, "proj_type", "a rank below both sides"),
        (not two_sided or complement == "none", "proj_type", 'complement="none"'),
        (settings["history"] is None or keeps_history, "history", f'fisher "history" or "two_sided", but fisher = {fisher!r}'),
        (fisher != "diagonal" or moments == "momentum", "fisher", 'moments="momentum": it takes the place of the second moment'),
        (fisher != "diagonal" or complement != "fira", "fisher", 'complement "raw" or "none"'),
        (complement != "raw" or fisher == "diagonal", "complement", 'fisher="diagonal", which scales it'),
        (complement == "none" or projects, "complement", "a rank below both sides: without a projection nothing is dropped"),
        (
            settings["min_rank"] is None or settings["on_refresh"] != "keep",
            "on_refresh",
            '"rotate" or "reset" where the rank adapts: moments of one rank mean nothing at another',
        ),
        (settings["min_rank"] is None or projects, "min_rank", "a number as rank, the largest one"),
        (settings["min_rank"] is not None or not projects or not settings["converged_below"], "converged_below", "a min_rank"),
        (settings["min_rank"] is None or not projects or settings["min_rank"] <= rank, "min_rank", f"rank >= min_rank, but rank = {rank}"),
    )
    for holds, key, rule in rules:
        if not holds:
            raise ValueError(f"{where}: {key} = {settings[key]!r} needs {rule}")
    return {**group, **{key: settings[key] for key in ("proj_type", "history", "moments", "complement")}}
