"""What a report is made of: sections of paragraphs, tables and charts, all of plain text, which the writers of a format escape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: of each column; the first one names the rows.
        rows: of as many cells as the header.
        caption: what the numbers are, with their unit.
        numbers: whether all columns but the first hold numbers, which are set to the right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: bool = True

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), "every row of a table has as many cells as its header"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it: text (a paragraph) and tables.

    `Section("Verdict", ["B is better by 0.031 +- 0.008 nats.", Table(["run", "loss"], [["A", "3.21"], ["B", "3.18"]])])`
    """

    heading: str
    content: Sequence[str | Table]
