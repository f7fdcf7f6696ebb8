"""What a run of a comparison came to: the loss at its end, what it kept in memory, how long a step took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.comparison.arms import Arm
from ngpt.config.schema import steps_in_run
from ngpt.report.runs import ReportError, RunHistory, read_run

GIB = 2**30


@dataclass(frozen=True)
class Result:
    """One finished run; memory in bytes.

    Attributes:
        loss: held-out, nats a token, after the last step; exact.
        galore_perplexity: of the same evaluation, by the arithmetic of the published tables; NaN where it was not recorded.
        peak: the highest of the device's allocator, or of the resident set on a CPU; of several ranks the largest.
        step_seconds: the median over the records after the first, which counts what only happens once.
    """

    seed: int
    loss: float
    galore_perplexity: float
    bits_per_byte: float
    weights: float
    state: float
    peak: float
    step_seconds: float
    tokens: float
    held_out_tokens: float


def result_of(run: RunHistory, arm: Arm, seed: int) -> Result:
    """The result of a run that was trained to its end. Raises ReportError where it was not, saying what is missing."""
    steps, losses = run.series("val/loss")
    last = steps_in_run(arm.config.trainer)
    if not steps or steps[-1] != last:
        reached = max((record["step"] for record in run.records), default=0)
        what = f"it is at step {reached} of {last}" if reached < last else "its last evaluation is missing or not finite"
        raise ReportError(f"{run.folder}: {what}")

    def last_of(name: str) -> float:
        value = run.last(name)
        return math.nan if value is None else value

    step_seconds = run.series("time/step_s")[1]
    peaks = run.series("memory/peak_allocated_largest_gib")[1] or run.series("memory/peak_allocated_gib")[1]
    return Result(
        seed=seed,
        loss=losses[-1],
        galore_perplexity=last_of("val/perplexity_galore_protocol"),
        bits_per_byte=last_of("val/bits_per_byte"),
        weights=last_of("memory/weights_gib") * GIB,
        state=last_of("memory/optimizer_state_gib") * GIB,
        peak=max(peaks, default=math.nan) * GIB,
        step_seconds=statistics.median(step_seconds[1:] or step_seconds or [math.nan]),
        tokens=last_of("tokens"),
        held_out_tokens=last_of("val/tokens"),
    )


@dataclass(frozen=True)
class Standing:
    """An arm with its finished runs by seed; means are over those."""

    arm: Arm
    results: Mapping[int, Result]

    @property
    def losses(self) -> dict[int, float]:
        return {seed: result.loss for seed, result in self.results.items()}

    @property
    def loss(self) -> float:
        return self.mean(lambda result: result.loss)

    @property
    def spread(self) -> float:
        """Standard deviation of the loss over seeds; NaN with one."""
        losses = list(self.losses.values())
        return statistics.stdev(losses) if len(losses) > 1 else math.nan

    @property
    def perplexity(self) -> float:
        """Of the mean loss: the geometric mean over seeds."""
        return math.exp(min(self.loss, 700.0))

    def mean(self, of: Callable[[Result], float]) -> float:
        values = [of(result) for result in self.results.values()]
        return statistics.fmean(values) if values else math.nan


def standing(arm: Arm, seeds: Sequence[int], folder_of: Callable[[int], Path]) -> tuple[Standing, list[RunHistory]]:
    """An arm as its run folders tell it, and the runs that are there, finished or not."""
    results: dict[int, Result] = {}
    runs = []
    for seed in seeds:
        try:
            run = read_run(folder_of(seed))
        except ReportError:
            continue
        runs.append(run)
        try:
            results[seed] = result_of(run, arm, seed)
        except ReportError:
            continue
    return Standing(arm, results), runs
