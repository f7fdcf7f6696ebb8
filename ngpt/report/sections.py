"""What is said of runs: the sections of a report, from the histories of its runs."""

from __future__ import annotations

from collections.abc import Sequence

from ngpt.report.parts import Section, Table
from ngpt.report.runs import RunHistory


def sections_of(runs: Sequence[RunHistory]) -> list[Section]:
    """All sections of a report on `runs`, in their order."""
    rows = [[run.name, *(_figure(run.last(name)) for name in ("tokens", "train/loss", "val/loss", "val/perplexity"))] for run in runs]
    return [Section("Results", [Table(["run", "tokens", "train loss", "held-out loss", "held-out perplexity"], rows)])]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
