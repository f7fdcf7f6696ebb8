"""Subspace health: how much of the gradient the projections capture, how far a refresh turns them, and the rank of every layer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ngpt.report.charts import charts_of, metric_chart
from ngpt.report.parts import Grid, Part
from ngpt.report.runs import RunHistory, finite

HOW_TO = "Not recorded in these runs: logger.statistics_every=100 writes the statistics of every layer each 100 steps, at little cost."
_MEANS = (
    ("subspace/captured_energy", "Captured gradient energy, mean of projected matrices, %", 100.0),
    ("subspace/overlap", "Overlap of a subspace with the one before its refresh, mean, %", 100.0),
    ("subspace/rank", "Rank, mean of projected matrices", 1.0),
)
_OF_LAYERS = (("captured_energy", "captured energy"), ("overlap", "overlap at the last refresh"), ("rank", "rank"))
_BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # in the order in which a block computes
_LAYER = re.compile(r"^layers/(?:.*\.)?layers\.(\d+)\.(.+?)(?:\.weight)?/(\w+)$")
_OTHER = re.compile(r"^layers/(.+?)(?:\.weight)?/(\w+)$")


def subspace_content(runs: Sequence[RunHistory]) -> list[Part]:
    """Means over time, and the last values of each matrix; a note how to record them where no run has them."""
    charts = charts_of(runs, [metric_chart(runs, name, title, look="dots", scale=scale, zero=True) for name, title, scale in _MEANS])
    grids = [grid for run in runs for metric, label in _OF_LAYERS if (grid := _grid(run, metric, label, several=len(runs) > 1))]
    if not charts and not grids:
        return [HOW_TO] if any(_is_projected(run) for run in runs) else []
    explained = (
        "Captured energy is the share of the squared gradient inside the subspace (1: nothing is lost); overlap is how much of a "
        "subspace is kept by its refresh (1: nothing turned, the refresh was not needed; near 0: gradients have moved on, or are noise). "
        "Two subspaces that have nothing to do with each other overlap by rank / shorter side of the matrix."
    )
    return [explained, *charts, *grids]


def _is_projected(run: RunHistory) -> bool:
    optimizer = run.config.get("optimizer")
    return isinstance(optimizer, dict) and "update_proj_gap" in optimizer


def _grid(run: RunHistory, metric: str, label: str, *, several: bool) -> Grid | None:
    """The last record of a metric by matrix and layer; None where no matrix has it, or all have the same rank."""
    suffix = f"/{metric}"
    # Statistics of layers have records of their own: the others, which are many more, need not be looked through.
    own = (one for one in reversed(run.records) if "train/loss" not in one)
    record = next((one for one in own if any(name.startswith("layers/") and name.endswith(suffix) for name in one)), None)
    if record is None:
        return None
    cells: dict[str, dict[str, float]] = {}
    for name, value in record.items():
        number = finite(value)
        if number is None or not name.startswith("layers/") or not name.endswith(suffix):
            continue
        if match := _LAYER.match(name):
            cells.setdefault(match[2].rpartition(".")[2], {})[match[1]] = number
        elif match := _OTHER.match(name):
            cells.setdefault(match[1].rpartition(".")[2], {})["-"] = number
    values = [value for row in cells.values() for value in row.values()]
    if not values or (metric == "rank" and len(set(values)) == 1):
        return None
    columns = sorted(
        {column for row in cells.values() for column in row}, key=lambda column: (column == "-", int(column) if column != "-" else 0)
    )
    highest = max(values) if metric == "rank" else 1.0
    title = f"{run.name}: {label}" if several else f"{label[0].upper()}{label[1:]}"
    names = sorted(cells, key=lambda name: (_BLOCK.index(name) if name in _BLOCK else len(_BLOCK), name))
    return Grid(
        f"{title} by matrix and layer, step {record['step']}",
        names,
        columns,
        [[row.get(column) for column in columns] for row in map(cells.__getitem__, names)],
        highest,
    )
