"""Signals as a polite request: finish the step, save, exit with a code that says why."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from ngpt.dist.collectives import Collectives
from ngpt.dist.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN

logger = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGTERM: EXIT_TRY_AGAIN, signal.SIGUSR1: EXIT_TRY_AGAIN, signal.SIGINT: EXIT_INTERRUPTED}


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    def agreed(self, collectives: Collectives, device: torch.device) -> bool:
        """Whether any rank was asked; afterwards all know the signal. All ranks must ask together.

        Launchers send signals to the ranks one after another, or to some of them only.
        """
        if collectives.size == 1:
            return self()
        number = int(collectives.max_(torch.tensor(self.signal or 0, device=device)))
        if number and self.signal is None:
            self.signal = signal.Signals(number)
            logger.warning("%s on another rank: saving, then exiting", self.signal.name)
        return number > 0  # and not what a signal may have changed here since: all ranks stop after the same step

    @property
    def exit_code(self) -> int:
        """0 where nobody asked."""
        return 0 if self.signal is None else EXIT_CODES[self.signal]


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM, SIGINT or SIGUSR1 into a StopRequest; the next one acts as if we were not here.

    The handlers that were installed before are put back on leaving.
    """
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in EXIT_CODES}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()
        logger.warning("%s: finishing the step, saving, then exiting (again to exit at once)", request.signal.name)

    for number in EXIT_CODES:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        restore()
