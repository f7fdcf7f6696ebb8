"""Sections as Markdown, with the tables of GitHub's dialect."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ngpt.report.numbers import numbers_of
from ngpt.report.parts import Legend, Part, Section, Table


def markdown_page(title: str, about: str, sections: Sequence[Section]) -> str:
    """The file; nothing that comes from a run is read as markup. Pictures become the tables of their numbers."""
    parts = [f"# {escaped(title)}", escaped(about)]
    for section in sections:
        parts += [f"## {escaped(section.heading)}", *(_part(part) for part in section.content if not isinstance(part, Legend))]
    return "\n\n".join(parts) + "\n"


def _part(part: Part) -> str:
    if isinstance(part, str):
        return escaped(part)
    if isinstance(part, Table):
        return _table(part)
    assert not isinstance(part, Legend)
    return "\n\n".join(
        [f"### {escaped(part.title)}", *([escaped(part.note)] if part.note else []), _table(numbers_of(part), caption=False)]
    )


def escaped(text: str) -> str:
    """`text` on one line, with a backslash before whatever could be markup."""
    return re.sub(r"([\\`*\[\]<>|&#~]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _table(table: Table, *, caption: bool = True) -> str:
    rule = ["---", *["---:" if table.numbers else "---"] * (len(table.header) - 1)]
    rows = [
        [f"**{escaped(cell)}**" if (number, column) in table.best else escaped(cell) for column, cell in enumerate(row)]
        for number, row in enumerate(table.rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in ([escaped(cell) for cell in table.header], rule, *rows)]
    return "\n".join([*([escaped(table.caption), ""] if caption and table.caption else []), *lines])
