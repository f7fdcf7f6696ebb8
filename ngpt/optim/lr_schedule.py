"""Learning-rate schedules: pure functions of the update number that return the factor on the peak learning rate.

`step` counts updates from 0. Warm-up starts above zero, (step + 1) / warmup_steps, and reaches 1 in its last update. After
`total_steps` the factor stays at its floor.
"""

from __future__ import annotations

import math


def cosine(step: int, *, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.0) -> float:
    """Half a cosine from 1 to `min_lr_ratio` after the warm-up: the schedule of the GaLore benchmark with 0.1."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps)))


def linear(step: int, *, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.0) -> float:
    """A straight line from 1 to `min_lr_ratio` after the warm-up."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 1 - (1 - min_lr_ratio) * _progress(step, warmup_steps, total_steps)


def wsd(step: int, *, total_steps: int, warmup_steps: int = 0, decay_fraction: float = 0.2, min_lr_ratio: float = 0.0) -> float:
    """Warm-up, stable at 1, then a straight line to `min_lr_ratio` over the last `decay_fraction` of the run (arXiv:2404.06395)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_start = max(warmup_steps, total_steps - round(decay_fraction * total_steps))
    return 1 - (1 - min_lr_ratio) * _progress(step, decay_start, total_steps)


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """1 after the warm-up."""
    return (step + 1) / warmup_steps if step < warmup_steps else 1.0


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` is from `start` to `end`, within [0, 1]."""
    if step >= end:
        return 1.0
    return max(0, step - start) / max(1, end - start)
