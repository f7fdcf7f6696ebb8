"""Sections as one HTML page that needs no other file and no network."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ngpt.report.parts import Section, Table


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The page; everything that comes from a run is escaped."""
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n</head>\n'
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    content = "\n".join(_table(item) if isinstance(item, Table) else f"<p>{html.escape(item)}</p>" for item in section.content)
    return f"<section>\n<h2>{html.escape(section.heading)}</h2>\n{content}\n</section>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f"<table>\n<caption>{html.escape(table.caption)}</caption>\n<tr>{head}</tr>\n{rows}\n</table>"
