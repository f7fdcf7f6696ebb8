"""What is worked out from the records of a run: series against tokens, its length, time and peak of memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ngpt.report.curves import Series
from ngpt.report.runs import RunHistory, as_numbers, finite


def against(run: RunHistory, metric: str, axis: str = "tokens") -> tuple[Series, Series]:
    """Values of `metric` at values of `axis`, one for each record that has both; NaN where the metric was not finite."""
    having = [record for record in run.records if metric in record and axis in record]
    places, values = (as_numbers([record[name] for record in having]) for name in (axis, metric))
    known = np.isfinite(places)
    order = np.argsort(places[known], kind="stable")
    return places[known][order], values[known][order]


def tokens_at(run: RunHistory, step: int) -> float | None:
    """Tokens seen after `step`, between the records around it; None where there are no records."""
    places, tokens = against(run, "tokens", axis="step")
    return float(np.interp(step, places, tokens)) if len(places) else None


def seconds_at(run: RunHistory) -> tuple[Series, Series]:
    """Steps, and seconds of training until each of them: the mean time of a step of each record times its steps."""
    steps, seconds = against(run, "time/step_s", axis="step")
    return steps, np.cumsum(np.nan_to_num(seconds) * np.diff(steps, prepend=0.0))


def training_seconds(run: RunHistory) -> float:
    """Seconds of training in all records; 0 where none has any."""
    seconds = seconds_at(run)[1]
    return float(seconds[-1]) if len(seconds) else 0.0


def peak_gib(run: RunHistory) -> float | None:
    """The most memory of one device, of any rank where all of them were asked."""
    values = [run.series(f"memory/{name}_gib")[1] for name in ("peak_allocated_largest", "peak_allocated")]
    return max((max(found) for found in values if found), default=None)


def planned_steps(run: RunHistory) -> int | None:
    """How many steps the settings ask for; None where they cannot be read."""
    trainer: Any = run.config.get("trainer")
    if not isinstance(trainer, dict):
        return None
    if finite(trainer.get("max_steps")):
        return int(trainer["max_steps"])
    numbers = [finite(trainer.get(name)) for name in ("max_tokens", "global_batch_size", "seq_len")]
    tokens, batch, length = numbers
    return math.ceil(tokens / (batch * length)) if tokens and batch and length else None
