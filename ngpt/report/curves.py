"""Long series made short for drawing: thinned so that no extreme is lost, and smoothed without a lag."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]


def thinned(x: Series, y: Series, buckets: int) -> tuple[Series, Series]:
    """At most `2 buckets + 2` points that look like all of them: of each of `buckets` equal parts of the axis the lowest and the highest.

    Args:
        x: ascending.
        y: of the same length; NaN where the line is broken. A part of the axis without any value stays a break.
    """
    if len(x) <= 2 * buckets:
        return x, y
    width = (x[-1] - x[0]) / buckets or 1.0
    edges = np.searchsorted(x, x[0] + width * np.arange(1, buckets))
    kept = {0, len(x) - 1}
    for first, end in zip([0, *edges], [*edges, len(x)], strict=True):
        part = y[first:end]
        if not len(part):
            continue
        if np.isnan(part).all():
            kept.add(int(first))
        else:
            kept |= {int(first + np.nanargmin(part)), int(first + np.nanargmax(part))}
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def window_of(count: int) -> int:
    """Over how many records a line of `count` records is smoothed: an odd number, a twenty-fifth of them; 1 for short lines."""
    return 2 * (count // 50) + 1


def smoothed(y: Series, window: int) -> Series:
    """The mean over `window` (odd) records around each; fewer, and the same number on both sides, towards the ends. NaN is left out."""
    reach = np.minimum(np.minimum(np.arange(len(y)), np.arange(len(y))[::-1]), window // 2)
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(y, nan=0.0))])
    counts = np.concatenate([[0], np.cumsum(~np.isnan(y))])
    here = np.arange(len(y))
    total, number = (a[here + reach + 1] - a[here - reach] for a in (sums, counts))
    return np.where(np.isnan(y), np.nan, total / np.maximum(number, 1))
