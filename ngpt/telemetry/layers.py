"""Statistics of single layers as a flat record: `layers/<parameter>/<figure>`, and means over projected matrices as `subspace/<figure>`."""

from __future__ import annotations

import math

from ngpt.loop.train_step import StepResult
from ngpt.telemetry.metrics import Record

OF_SUBSPACES = ("captured_energy", "overlap", "rank")


def layer_record(result: StepResult) -> Record:
    """The record of a watched update; what is not finite is null, and a mean is over the matrices of which its figure is known."""
    statistics = result.update.statistics or {}
    record: Record = {"step": result.step, "tokens": result.tokens}
    for figure in OF_SUBSPACES:
        known = [figures[figure] for figures in statistics.values() if figure in figures and math.isfinite(figures[figure])]
        if known:
            record[f"subspace/{figure}"] = sum(known) / len(known)
    for name, figures in statistics.items():
        record |= {f"layers/{name}/{figure}": value if math.isfinite(value) else None for figure, value in figures.items()}
    return record
