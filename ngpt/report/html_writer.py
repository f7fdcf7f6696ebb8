"""Sections as one HTML page that needs no other file, no script and no network, in a light and a dark mode, for large and small screens."""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
from collections.abc import Sequence

from ngpt.report.numbers import numbers_of
from ngpt.report.parts import Bars, Chart, Grid, Legend, Part, Section, Table
from ngpt.report.style import STYLE
from ngpt.report.svg import bars_svg, chart_svg, grid_svg, sample_svg

PICTURES = (Chart, Bars, Grid)
_WORD = (
    28  # characters of a word that are never broken, in cells and, of names, which stand still while a table is scrolled, in the first one
)
_NAME = 16
_PIECES = re.compile(r"[^-_./,=]{0,23}(?:[-_./,=]|[^-_./,=]|$)")


def html_page(title: str, about: str, sections: Sequence[Section]) -> str:
    """The page; every text is escaped."""
    links = "\n".join(f'<a href="#s{number}">{html.escape(section.heading)}</a>' for number, section in enumerate(sections))
    body = "\n".join(_section(number, section) for number, section in enumerate(sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p>{html.escape(about)}</p>
<nav aria-label="Sections">
{links}
</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    """Pictures that follow each other stand side by side, where there is room."""
    parts = []
    for pictures, group in itertools.groupby(section.content, key=lambda part: isinstance(part, PICTURES)):
        inner = "\n".join(map(_part, group))
        parts.append(f'<div class="pictures">\n{inner}\n</div>' if pictures else inner)
    content = "\n".join(parts)
    return f'<section id="s{number}">\n<h2>{html.escape(section.heading)}</h2>\n{content}\n</section>'


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Legend):
        return _key([(name, colour, "line") for colour, name in enumerate(part.names)])
    return _figure(part)


def _figure(picture: Chart | Bars | Grid) -> str:
    """A picture with its title, its key, how to read it, and its numbers, folded away."""
    if isinstance(picture, Chart):
        drawn, key = chart_svg(picture), _key(picture.key) if picture.key else ""
    elif isinstance(picture, Bars):
        drawn, key = bars_svg(picture), _key([(part, colour, "square") for colour, part in enumerate(picture.parts)])
    else:
        drawn, key = grid_svg(picture), ""
    note = f'<p class="note">{html.escape(picture.note)}</p>\n' if picture.note else ""
    return (
        f"<figure>\n<figcaption>{html.escape(picture.title)}</figcaption>\n{key}\n{drawn}\n{note}"
        f"<details><summary>Numbers</summary>\n{_table(dataclasses.replace(numbers_of(picture), caption=''))}\n</details>\n</figure>"
    )


def _key(entries: Sequence[tuple[str, int, str]]) -> str:
    items = "\n".join(f"<li>{sample_svg(colour, look)}<span>{html.escape(label)}</span></li>" for label, colour, look in entries)
    return f'<ul class="key">\n{items}\n</ul>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_breakable(cell)}</th>' for cell in table.header)
    rows = "\n".join(_row(table, number, row) for number, row in enumerate(table.rows))
    name = f' aria-label="{html.escape(table.caption)}"' if table.caption else ""
    drawn = (
        f'<div class="scroll" tabindex="0"><table class="{"numbers" if table.numbers else "words"}"{name}>\n'
        f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
    if table.folded:
        drawn = f"<details><summary>{html.escape(table.folded)}</summary>\n{drawn}\n</details>"
    # Not a <caption>: that would be as wide as the table, and so be cut off where the table has to be scrolled.
    return f'{drawn}\n<p class="note">{html.escape(table.caption)}</p>' if table.caption else drawn


def _row(table: Table, number: int, row: Sequence[str]) -> str:
    cells = [
        f'<td class="best">{_breakable(cell)}</td>' if (number, column) in table.best else f"<td>{_breakable(cell)}</td>"
        for column, cell in enumerate(row[1:], start=1)
    ]
    return f'<tr><th scope="row">{_breakable(row[0], _NAME)}</th>{"".join(cells)}</tr>'


def _breakable(text: str, unbroken: int = _WORD) -> str:
    """Escaped text whose words of more than `unbroken` characters may go on in the next line, best after punctuation."""

    def word(match: re.Match[str]) -> str:
        pieces = _PIECES.findall(match[0]) if len(match[0]) > unbroken else [match[0]]
        return "<wbr>".join(map(html.escape, pieces))

    return re.sub(r"\S+", word, text)
