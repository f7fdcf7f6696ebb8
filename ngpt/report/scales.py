"""Axes: which values a chart spans, where its ticks are, and how numbers are written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ngpt.report.curves import Series

_USUAL = 0.98  # of all values are below what an axis must reach
_LARGEST_LOG = 700.0  # what exp can still take
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A number in few characters: 1.2M, 350k, 0.004."""
    for size, unit in _UNITS:
        if size <= abs(value) < 1e15:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def figure(value: float | None, digits: int = 4) -> str:
    """A number of a table, to `digits` significant digits at least; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else math.floor(math.log10(abs(value))) + 1
    return f"{value:,.{max(0, digits - whole)}f}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values to positions from 0 to 1, linear or logarithmic. Values beyond the ends land on them."""

    low: float
    high: float
    log: bool = False

    def __call__(self, values: Series) -> Series:
        low, high = self.low, self.high
        if self.log:
            values = np.log(np.maximum(values, low))
            low, high = math.log(low), math.log(high)
        return np.clip((values - low) / (high - low), 0.0, 1.0)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends."""
        return _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)


def scale_for(lines: Sequence[Series], *, log: bool = False, zero: bool = False, whole: bool = True, room: float = 0.04) -> Scale:
    """The scale for lines that share an axis.

    Args:
        log: logarithmic; values that are not positive are left out.
        zero: the axis begins at 0.
        whole: the first value of every line is inside.
        room: between the values and the ends, as a share of the axis.

    A few wild values (a loss spike) do not squeeze everything else: the axis ends no higher than above the 98th percentile by twice its
    distance from the lowest value, or at the highest first value.
    """
    finite = [line[np.isfinite(line) & ((line > 0) if log else True)] for line in lines]
    finite = [line for line in finite if len(line)]
    if not finite:
        return Scale(0.0, 1.0) if not log else Scale(1.0, 10.0, log=True)
    shown = [np.log(line) for line in finite] if log else finite
    values = np.concatenate(shown)
    low, high = float(values.min()), float(values.max())
    low = min(low, 0.0) if zero else low
    usual = float(np.quantile(values, _USUAL))
    high = min(high, max([usual + 2 * (usual - low), *(float(line[0]) for line in shown if whole)]))
    if high <= low:  # a constant
        apart = 0.1 if log else abs(high) * 0.1 or 1.0
        high, low = high + apart, low if zero else low - apart
    margin = (high - low) * room
    low, high = low if zero and low == 0 else low - margin, high + margin
    return Scale(math.exp(low), math.exp(min(high, _LARGEST_LOG)), log=True) if log else Scale(low, high)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 2.5, 5, 10, 20) if (high - low) / (multiple * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [multiple * 10.0**decade for decade in decades for multiple in multiples if low <= multiple * 10.0**decade <= high]
        if len(found) <= most:
            break
    every = -(-len(found) // most)
    return found[::every] if len(found) > 1 else _linear_ticks(low, high, most)
