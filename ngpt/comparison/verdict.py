"""The outcome in plain words: which arm is better, by how much, how sure that is, and what it costs in memory and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ngpt.comparison.arms import differing
from ngpt.comparison.results import Result, Standing
from ngpt.comparison.statistics import CONFIDENCE, paired_difference
from ngpt.report.page import Section, Table

_EQUAL_STATE = 0.01  # bytes of tensors: exact but for counters
_EQUAL_PEAK = 0.03  # a resident set of a CPU process differs by a few per cent from start to start
_EQUAL_TIME = 0.05


def verdict(baseline: Standing, other: Standing) -> str:
    """One sentence on the two: the mean of the paired differences of the held-out loss, and memory and time beside it."""
    a, b = baseline.arm.name, other.arm.name
    difference = paired_difference(baseline.losses, other.losses)
    if difference is None:
        return f"{b} and {a} cannot be compared: there is no seed of which both have finished."
    seeds = f"{difference.pairs} seeds" if difference.pairs > 1 else "1 seed"
    costs = costs_of(baseline, other)
    if difference.pairs == 1:
        where = "ahead of" if difference.mean < 0 else "behind" if difference.mean > 0 else "level with"
        return (
            f"{b} is {where} {a} by {abs(difference.mean):.4f} nats {costs}; this is one seed, so nothing can be said of the spread: "
            "give --seeds 0,1,2."
        )
    interval = f"{CONFIDENCE:.0%} interval of {seeds}, paired; standard error {difference.standard_error:.4f}"
    if not difference.is_told:
        untold = f"{difference.mean:+.4f} ± {difference.half_width:.4f} nats ({interval})"
        return f"No difference can be told between {b} and {a}: {untold}, {costs}. More seeds narrow the interval."
    better = "better" if difference.mean < 0 else "worse"
    return f"{b} is {better} than {a} by {abs(difference.mean):.4f} ± {difference.half_width:.4f} nats ({interval}) {costs}."


def costs_of(baseline: Standing, other: Standing) -> str:
    """`at equal memory and 1.05 times the time a step`: what `other` takes, as a share of what `baseline` takes."""

    def share(of: Callable[[Result], float]) -> float:
        return _ratio(other.mean(of), baseline.mean(of))

    state, peak, seconds = (share(of) for of in (lambda r: r.state, lambda r: r.peak, lambda r: r.step_seconds))
    equal_state, equal_peak = abs(state - 1) <= _EQUAL_STATE, abs(peak - 1) <= _EQUAL_PEAK
    parts = ["equal time a step" if abs(seconds - 1) <= _EQUAL_TIME else f"{seconds:.2f} of the time a step"]
    if equal_state and equal_peak:
        return f"at equal memory and {parts[0]}"
    parts.insert(0, "equal peak memory" if equal_peak else f"{peak:.2f} of the peak memory")
    parts.insert(0, "equal optimizer state" if equal_state else f"{state:.2f} of the optimizer state")
    return f"with {', '.join(parts[:-1])} and {parts[-1]}"


def sections(standings: Sequence[Standing], seeds: Sequence[int], baseline: str | None, notes: Sequence[str]) -> list[Section]:
    """The verdict and the tables behind it, for each column of the comparison.

    Args:
        baseline: the name of the arm with which the others are compared; None: the first one.
        notes: what else a reader must know, such as runs that failed.
    """
    made = []
    for column in dict.fromkeys(each.arm.column for each in standings):
        group = [each for each in standings if each.arm.column == column]
        reference = next((each for each in group if each.arm.name == baseline), group[0])
        others = [each for each in group if each is not reference]
        heading = f"Verdict, {column}" if column else "Verdict"
        remarks = [*_remarks(group, others), *(notes if not made else [])]
        verdicts = [verdict(reference, other) for other in others]
        made.append(Section(heading, [*verdicts, *remarks, arms_table(group), seeds_table(reference, others, seeds)]))
    return made


def _remarks(group: Sequence[Standing], others: Sequence[Standing]) -> Iterator[str]:
    for line in differing([each.arm for each in group]):
        yield f"The arms differ in {line}: that was allowed, and is part of what is compared."
    for what, of in (("trained on", lambda r: r.tokens), ("were judged by", lambda r: r.held_out_tokens)):
        counts: dict[str, float] = {each.arm.name: each.mean(of) for each in group if each.results}
        if len({*counts.values()}) > 1 and not differing([each.arm for each in group]):
            each_count = ", ".join(f"{name} {count:,.0f}" for name, count in counts.items())
            yield f"The arms {what} different numbers of tokens ({each_count}): what is said of them does not hold."
    if len(others) > 1 and any(len(each.results) > 1 for each in group):
        misses = f"of intervals of {CONFIDENCE:.0%} one in {1 / (1 - CONFIDENCE):.0f} misses the truth"
        yield f"Each interval is that of its own pair: {misses}."


def arms_table(group: Sequence[Standing]) -> Table:
    """One row an arm."""
    rows = [
        [
            each.arm.name,
            str(len(each.results)),
            _number(each.loss, ".4f"),
            _number(each.spread, ".4f"),
            _number(each.perplexity, ".2f"),
            _number(each.mean(lambda r: r.bits_per_byte), ".4f"),
            _bytes(each.mean(lambda r: r.state)),
            _bytes(each.mean(lambda r: r.peak)),
            _number(1e3 * each.mean(lambda r: r.step_seconds), ".0f"),
        ]
        for each in group
    ]
    header = ["arm", "runs", "loss", "spread", "perplexity", "bits/byte", "optimizer state", "peak memory", "ms a step"]
    caption = "Means over the finished runs. Held-out loss in nats a token; its spread is the standard deviation over seeds."
    return Table(header, rows, caption)


def seeds_table(reference: Standing, others: Sequence[Standing], seeds: Sequence[int]) -> Table:
    """One row a seed: the losses, and their differences from the reference."""
    rows = []
    for seed in seeds:
        base = reference.losses.get(seed, math.nan)
        row = [str(seed), _number(base, ".4f")]
        for other in others:
            loss = other.losses.get(seed, math.nan)
            row += [_number(loss, ".4f"), _number(loss - base, "+.4f")]
        rows.append(row)
    header = ["seed", reference.arm.name, *(cell for other in others for cell in (other.arm.name, f"minus {reference.arm.name}"))]
    return Table(header, rows, "Held-out loss by seed: the differences that the verdict is made of.")


def _ratio(value: float, of: float) -> float:
    return value / of if of else math.nan


def _number(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"


def _bytes(count: float) -> str:
    if not math.isfinite(count):
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
