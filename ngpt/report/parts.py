"""What a report is made of: sections of paragraphs, tables and pictures, all of plain text, which the writers of a format escape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ngpt.report.curves import Series


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: of each column; the first one names the rows.
        rows: of as many cells as the header.
        caption: what the numbers are, with their unit.
        numbers: whether all columns but the first hold numbers, which are set to the right.
        best: cells, by row and column, that are set in bold.
        folded: what stands in place of the table until it is opened; empty: it is open.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: bool = True
    best: frozenset[tuple[int, int]] = frozenset()
    folded: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), "every row of a table has as many cells as its header"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: of the run, and of which of its quantities where a chart has several of one run.
        colour: number of the colour, and of the dashes: that of the run, if lines are runs.
        x: ascending.
        y: NaN where the line is broken.
        look: `line`; `thin` for raw values under a smoothed line; `unseen` for values that are only listed; `dots` for a line with a
            dot for each value.
        listed: whether the chart's table of numbers has it.
    """

    name: str
    colour: int
    x: Series
    y: Series
    look: str = "line"
    listed: bool = True


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the x axis."""

    x: float
    colour: int
    text: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Attributes:
        title: quantity and unit.
        x_title: likewise, of the x axis.
        log: the y axis is logarithmic.
        zero: it begins at 0.
        whole: the first value of every line is inside, however far it is from the others: a loss begins high.
        note: how to read it.
        key: name and look of lines, where a chart has more kinds of lines than runs: label, colour, look.
        marks: events, drawn at the upper edge.
    """

    title: str
    x_title: str
    lines: Sequence[Line]
    log: bool = False
    zero: bool = False
    whole: bool = True
    note: str = ""
    key: Sequence[tuple[str, int, str]] = ()
    marks: Sequence[Mark] = ()


@dataclasses.dataclass(frozen=True)
class Bars:
    """A bar for each run, made of parts: `values[run][part]`."""

    title: str
    names: Sequence[str]
    parts: Sequence[str]
    values: Sequence[Sequence[float]]
    unit: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values by row and column as shades of one colour; None where there is none."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    highest: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Legend:
    """Which colour is which run, for the charts below it."""

    names: Sequence[str]


Part = str | Table | Chart | Bars | Grid | Legend


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it: text (a paragraph), tables and pictures.

    `Section("Verdict", ["B is better by 0.031 +- 0.008 nats.", Table(["run", "loss"], [["A", "3.21"], ["B", "3.18"]])])`
    """

    heading: str
    content: Sequence[Part]
