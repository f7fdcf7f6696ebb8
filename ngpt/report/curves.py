"""Long series made short for drawing: thinned so that no extreme is lost, and smoothed without a lag and without smearing spikes."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]

_PLACES = 400  # of a smoothed line: as many as can be seen


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


def smoothed(x: Series, y: Series, window: int) -> tuple[Series, Series]:
    """The median of `window` (odd) records around each, at no more than 400 places; fewer, and as many on both sides, towards the ends.

    A median, because a single wild value leaves no trace in it: the thin line below has that value. NaN is left out.
    """
    count, reach = len(y), window // 2
    places = np.unique(np.linspace(0, count - 1, min(count, _PLACES)).round().astype(int))
    median = np.nanmedian if np.isnan(y).any() else np.median
    reaches = np.minimum(np.minimum(places, count - 1 - places), reach)
    inner = reaches == reach
    result = np.empty(len(places))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a window without any number, whose median is NaN: the line is broken there
        if inner.any():
            windows = np.lib.stride_tricks.sliding_window_view(y, window)
            result[inner] = median(windows[places[inner] - reach], axis=1)
        for index in np.flatnonzero(~inner):
            place, own = places[index], reaches[index]
            result[index] = median(y[place - own : place + own + 1])
    return x[places], result
