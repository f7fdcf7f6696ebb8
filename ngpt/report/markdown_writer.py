"""Sections as Markdown, with the tables of GitHub's dialect."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ngpt.report.parts import Section, Table


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """The file; nothing that comes from a run is read as markup."""
    parts = [f"# {escaped(title)}"]
    for section in sections:
        parts.append(f"## {escaped(section.heading)}")
        parts += [_table(item) if isinstance(item, Table) else escaped(item) for item in section.content]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` on one line, with a backslash before whatever could be markup."""
    return re.sub(r"([\\`*\[\]<>|&#~]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _table(table: Table) -> str:
    rule = ["---", *(["---:"] if table.numbers else ["---"]) * (len(table.header) - 1)]
    rows = [[escaped(cell) for cell in row] for row in (table.header, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
    return "\n".join([*([f"{escaped(table.caption)}\n"] if table.caption else []), *lines])
