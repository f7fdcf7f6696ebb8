"""Loss spikes: a loss far above those before it, told by median and deviation, which a few wild losses do not move."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_TO_STANDARD_DEVIATION = 1.4826  # of a normal distribution, from its median absolute deviation
_LEAST_SPREAD = 0.01  # of the median: on losses that hardly vary, a hundredth is no spike


@dataclass(frozen=True)
class SpikeRule:
    """When a loss counts as a spike, and whether its update is dropped before it is applied.

    `window` losses are looked back on; a spike is more than `deviations` standard deviations above their median.
    """

    window: int
    deviations: float
    drop: bool

    def limit(self, losses: Sequence[float]) -> float:
        """The highest loss that is no spike after `losses`; infinite while there are fewer than a quarter of the window.

        All ranks know the same losses, so all have the same limit. Losses that are not finite belong to no window: with one of them,
        means and deviations would say nothing for as long as it stays in.
        """
        recent = losses[-self.window :]
        if 4 * len(recent) < self.window:
            return math.inf
        median = statistics.median(recent)
        spread = statistics.median(abs(loss - median) for loss in recent)
        return median + self.deviations * max(_TO_STANDARD_DEVIATION * spread, _LEAST_SPREAD * abs(median))

    def remember(self, losses: list[float], loss: float) -> None:
        """Add a loss to those that the next ones are judged by.

        Spikes are added as well: where losses stay high, the median follows, and no update is dropped for ever.
        """
        if math.isfinite(loss):
            losses.append(loss)
            del losses[: -self.window]
