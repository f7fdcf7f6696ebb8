"""What a few paired runs say of a difference: mean, standard error and the interval of Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and how far it may be off.

    Attributes:
        mean: over the pairs.
        standard_error: of the mean; NaN where there is one pair.
        half_width: of the interval of `CONFIDENCE` around the mean; NaN where there is one pair.
        pairs: how many.
    """

    mean: float
    standard_error: float
    half_width: float
    pairs: int

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves 0 out; never with one pair."""
        return abs(self.mean) > self.half_width


def paired_difference(first: Mapping[int, float], second: Mapping[int, float], *, confidence: float = CONFIDENCE) -> Difference | None:
    """`second` minus `first`, paired by key (the seed); None where they have no key in common.

    What both runs of a pair share, initial weights and the order of the data, falls out of their difference. The interval holds for
    differences that are normally distributed over seeds.
    """
    differences = [second[key] - first[key] for key in first.keys() & second.keys()]
    if not differences:
        return None
    mean, pairs = math.fsum(differences) / len(differences), len(differences)
    if pairs == 1:
        return Difference(mean, math.nan, math.nan, 1)
    standard_error = statistics.stdev(differences) / math.sqrt(pairs)
    return Difference(mean, standard_error, t_quantile(confidence, pairs - 1) * standard_error, pairs)


def t_quantile(confidence: float, degrees: int) -> float:
    """The t for which |T| < t has probability `confidence`, T of Student's distribution with `degrees` (whole) degrees of freedom."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """The probability of |T| < t: the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):  # odd: cos, 2/3 cos^3, 2 4/(3 5) cos^5...; even: 1, 1/2 cos^2, 1 3/(2 4) cos^4...
        total += term
        term *= (k - 1) / k * cosine**2
    sine_times_series = math.sin(angle) * total
    return 2 / math.pi * (angle + sine_times_series) if odd else sine_times_series
