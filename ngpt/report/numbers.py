"""The numbers behind a picture as a table, for those who cannot see it and those who want to copy them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from ngpt.report.parts import Bars, Chart, Grid, Line, Table
from ngpt.report.scales import figure

_MOST_ROWS = 12
_FEW = 5


def numbers_of(picture: Chart | Bars | Grid) -> Table:
    """The values that are drawn; of a chart, those at up to a dozen places, as recorded and never smoothed."""
    if isinstance(picture, Bars):
        rows = [[name, *map(figure, values), figure(sum(values))] for name, values in zip(picture.names, picture.values, strict=True)]
        return Table(["run", *picture.parts, "together"], rows, f"{picture.title}, {picture.unit}")
    if isinstance(picture, Grid):
        rows = [[name, *map(figure, values)] for name, values in zip(picture.rows, picture.values, strict=True)]
        return Table(["matrix", *(f"layer {column}" for column in picture.columns)], rows, picture.title)
    lines = [line for line in picture.lines if line.listed and len(line.x)]
    places = _places(lines)
    rows = [[f"{place:,.10g}", *(figure(_at(line, place), 5) for line in lines)] for place in places]
    return Table([picture.x_title, *(line.name for line in lines)], rows, picture.title)


def _places(lines: Sequence[Line]) -> list[float]:
    """Up to a dozen x values, evenly over those that all lines share, or over the longest line's if they share few; its last one too."""
    if not lines:
        return []
    known = [line.x[~np.isnan(line.y)] for line in lines]
    longest = max(known, key=lambda places: float(places[-1]) if len(places) else 0.0)
    shared = functools.reduce(np.intersect1d, known)
    several = shared if len(shared) >= _FEW else longest
    if not len(several):
        return []
    chosen = np.linspace(0, len(several) - 1, min(_MOST_ROWS, len(several))).round().astype(int)
    return sorted({*several[chosen].tolist(), float(longest[-1])})


def _at(line: Line, place: float) -> float:
    """The value at `place`; NaN where the line has none there: nothing is interpolated."""
    index = int(np.searchsorted(line.x, place, side="right")) - 1
    return float(line.y[index]) if index >= 0 and math.isclose(line.x[index], place, rel_tol=1e-9) else math.nan
