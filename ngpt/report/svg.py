"""Pictures as SVG that stands in a page: no scripts, no fonts of its own; colours are the page's variables, so they follow its mode."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

from ngpt.report.curves import Series, thinned
from ngpt.report.parts import Bars, Chart, Grid, Line
from ngpt.report.scales import Scale, figure, scale_for, short

COLOURS = 8  # variables of the page: --c0 to --c7 for runs, --k0 to --k7 for kinds of memory
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")  # lines are told apart without colours too: every fourth one has the same dashes
_WIDTH, _HEIGHT = 420, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 42
_POINTS = 2400  # of all lines of one look in a chart together: what a large screen can show
_MOST_MARKS = 150
_MOST_TITLES = 40  # dots with a text of their own


def chart_svg(chart: Chart) -> str:
    """A chart. Lines are thinned to what can be seen."""
    lines = [line for line in chart.lines if np.isfinite(line.y).any()]
    seen = _seen(lines)
    if not seen:
        return ""
    y_scale = _y_scale(chart, seen)
    x_values = np.concatenate([line.x for line in seen])
    x_low, x_high = float(x_values.min()), float(x_values.max())
    x_scale = Scale(min(0.0, x_low) if x_low <= 0.2 * x_high else x_low, x_high if x_high > x_low else x_low + 1)
    buckets = max(60, _POINTS // 2 // max(1, sum(line.look != "thin" for line in seen)))
    drawn = [_line(line, x_scale, y_scale, min(400, buckets)) for line in sorted(seen, key=lambda line: line.look != "thin")]
    marks = [
        f'<path class="c{mark.colour % COLOURS}" d="M{_x(x_scale, mark.x):.1f} {_TOP}l-4 -8h8z">{_title(mark.text)}</path>'
        for mark in chart.marks[:_MOST_MARKS]
    ]
    return _svg(_HEIGHT, _described(chart, lines), [*_axes(chart, x_scale, y_scale), *drawn, *marks])


def beyond(chart: Chart) -> tuple[int, float]:
    """How many values lie above the upper edge of a chart, and the highest of them."""
    seen = _seen(chart.lines)
    edge = _y_scale(chart, seen).high
    wild = np.concatenate([line.y[line.y > edge] for line in seen if line.listed] or [np.array([])])
    return len(wild), float(wild.max()) if len(wild) else math.nan


def bars_svg(bars: Bars) -> str:
    """Horizontal bars, each with its name above it and its total behind it."""
    totals = [sum(values) for values in bars.values]
    longest = max(totals, default=0.0) or 1.0
    room = _WIDTH - 80
    drawn = []
    for index, (name, values) in enumerate(zip(bars.names, bars.values, strict=True)):
        top = 6 + 42 * index
        drawn.append(f'<text class="name" x="0" y="{top + 11}">{html.escape(_cut(name, 52))}{_title(name)}</text>')
        left = 0.0
        for part, (label, value) in enumerate(zip(bars.parts, values, strict=True)):
            width = value / longest * room
            if width > 0:
                text = _title(f"{name}: {label} {figure(value)} {bars.unit}")
                box = f'x="{left:.1f}" y="{top + 17}" width="{width:.1f}" height="16"'
                drawn.append(f'<rect class="bar k{part % COLOURS}" {box}>{text}</rect>')
            left += width
        drawn.append(f'<text x="{left + 6:.1f}" y="{top + 30}">{figure(totals[index], 3)} {html.escape(bars.unit)}</text>')
    described = f"{bars.title}: " + "; ".join(f"{name} {figure(total)} {bars.unit}" for name, total in zip(bars.names, totals, strict=True))
    return _svg(12 + 42 * len(bars.names), described, drawn)


def grid_svg(grid: Grid) -> str:
    """Cells whose shade is the value; the value stands in them where there is room."""
    left, top, height = 104, 20, 22
    width = min(56.0, (_WIDTH - left - 4) / max(1, len(grid.columns)))
    every = 1 if width >= 17 else math.ceil(22 / width)
    drawn = [
        f'<text class="middle" x="{left + (number + 0.5) * width:.1f}" y="14">{html.escape(column)}</text>'
        for number, column in enumerate(grid.columns)
        if number % every == 0
    ]
    for row, (name, values) in enumerate(zip(grid.rows, grid.values, strict=True)):
        y = top + row * height
        drawn.append(f'<text class="end" x="{left - 6}" y="{y + 15}">{html.escape(_cut(name, 16))}{_title(name)}</text>')
        for column, value in enumerate(values):
            if value is None:
                continue
            share = min(1.0, max(0.0, value / grid.highest)) if grid.highest > 0 else 0.0
            x = left + column * width
            text = _title(f"{name}, layer {grid.columns[column]}: {figure(value)}")
            drawn.append(
                f'<rect class="cell" fill-opacity="{share:.3f}" x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{height - 1}">'
                f"{text}</rect>"
            )
            if width >= 30:
                shade = " dark" if share > 0.75 else ""
                drawn.append(f'<text class="middle value{shade}" x="{x + (width - 1) / 2:.1f}" y="{y + 15}">{_in_cell(value)}</text>')
    return _svg(top + height * len(grid.rows) + 4, f"{grid.title}; the table below has the numbers", drawn)


def sample_svg(colour: int, look: str) -> str:
    """A piece of line for a legend."""
    dot = f'<circle class="c{colour % COLOURS}" cx="14" cy="6" r="3"/>' if look == "dots" else ""
    square = f'<rect class="bar k{colour % COLOURS}" x="0" y="0" width="12" height="12"/>' if look == "square" else ""
    line = "" if square else f'<path class="{_class(colour, look)}"{_dashes(colour)} d="M0 6H28"/>'
    width = 12 if square else 28
    return f'<svg class="sample" viewBox="0 0 {width} 12" width="{width}" height="12" aria-hidden="true">{line}{dot}{square}</svg>'


# ----------------------------------------------------------------------------------------------------------------------- pieces
def _svg(height: float, described: str, drawn: Sequence[str]) -> str:
    inner = "\n".join(drawn)
    return f'<svg class="picture" viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{html.escape(described)}">\n{inner}\n</svg>'


def _described(chart: Chart, lines: Sequence[Line]) -> str:
    """The chart in words: for each line its last value."""
    ends = (f"{line.name} ends at {figure(float(line.y[np.isfinite(line.y)][-1]))}" for line in lines if line.listed)
    return f"{chart.title} against {chart.x_title}: {'; '.join(ends)}"


def _seen(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.look != "unseen"]


def _y_scale(chart: Chart, lines: Sequence[Line]) -> Scale:
    return scale_for([line.y for line in lines], log=chart.log, zero=chart.zero, whole=chart.whole)


def _axes(chart: Chart, x_scale: Scale, y_scale: Scale) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    drawn = []
    for tick in y_scale.ticks():
        y = _y(y_scale, tick)
        drawn.append(
            f'<path class="rule" d="M{_LEFT} {y:.1f}H{right}"/><text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{short(tick)}</text>'
        )
    for tick in x_scale.ticks(5):
        x = _x(x_scale, tick)
        drawn.append(f'<path class="rule" d="M{x:.1f} {bottom}v4"/><text class="middle" x="{x:.1f}" y="{bottom + 18}">{short(tick)}</text>')
    drawn.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    drawn.append(f'<text class="middle quiet" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 5}">{html.escape(chart.x_title)}</text>')
    return drawn


def _line(line: Line, x_scale: Scale, y_scale: Scale, buckets: int) -> str:
    values = np.where(np.isfinite(line.y) & ((line.y > 0) | (not y_scale.log)), line.y, np.nan)
    x, y = thinned(line.x, values, buckets)
    across = _LEFT + x_scale(x) * (_WIDTH - _LEFT - _RIGHT)
    down = (_HEIGHT - _BOTTOM) - y_scale(y) * (_HEIGHT - _BOTTOM - _TOP)
    drawn = f'<path class="{_class(line.colour, line.look)}"{_dashes(line.colour)} d="{_path(across, down)}">{_title(line.name)}</path>'
    alone = np.isfinite(y) & ~_has_neighbour(y)  # a path of one point is nothing to see
    dotted = np.isfinite(y) if line.look == "dots" else alone
    if line.look == "dots" and dotted.sum() > _MOST_TITLES:
        dotted = alone
    for index in np.flatnonzero(dotted):
        text = _title(f"{line.name}: {figure(float(y[index]), 5)} at {short(float(x[index]))}")
        drawn += f'<circle class="c{line.colour % COLOURS}" cx="{across[index]:.1f}" cy="{down[index]:.1f}" r="2.6">{text}</circle>'
    return drawn


def _has_neighbour(y: Series) -> np.ndarray:
    known = np.concatenate([[False], np.isfinite(y), [False]])
    return known[:-2] | known[2:]


def _path(x: Series, y: Series) -> str:
    """Moves and lines; NaN lifts the pen."""
    commands, pen_down = [], False
    for across, down in zip(x.tolist(), y.tolist(), strict=True):
        if math.isnan(down):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{across:.1f} {down:.1f}")
        pen_down = True
    return "".join(commands)


def _in_cell(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 and value != int(value) else short(value)


def _title(text: str) -> str:
    """What a pointer over the element shows."""
    return f"<title>{html.escape(text)}</title>"


def _class(colour: int, look: str) -> str:
    return f"line {look} s{colour % COLOURS}"


def _dashes(colour: int) -> str:
    dashes = DASHES[colour // 4 % len(DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _x(scale: Scale, value: float) -> float:
    return _LEFT + float(scale(np.array([value]))[0]) * (_WIDTH - _LEFT - _RIGHT)


def _y(scale: Scale, value: float) -> float:
    return (_HEIGHT - _BOTTOM) - float(scale(np.array([value]))[0]) * (_HEIGHT - _BOTTOM - _TOP)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"
