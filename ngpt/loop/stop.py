"""Signals as a polite request: finish the step, save, exit with a code that says why."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from ngpt.dist.collectives import Collectives
from ngpt.dist.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN

logger = logging.getLogger(__name__)

SECONDS_OF_ONE_REQUEST = 1.0
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
    """Turn the first SIGTERM, SIGINT or SIGUSR1 into a StopRequest; the next one ends the process at once, with code 128 + its number.

    Signals within a second of the first are the same request: a terminal sends Ctrl-C to a launcher and to its ranks, and the launcher
    passes it on. The handlers that were installed before are put back on leaving. To be used in the main thread.
    """
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in EXIT_CODES}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.signal is None:
            request.signal = signal.Signals(number)
            text = "%s: finishing the step, saving, then exiting (again to exit at once, without saving)"
            logger.warning(text, request.signal.name)

    with _second_signal_exits():
        for number in EXIT_CODES:
            signal.signal(number, on_signal)
        try:
            yield request
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def _second_signal_exits() -> Iterator[None]:
    """A thread that ends the process at a second signal: handlers wait for the main thread, which may wait for other ranks."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        first = None
        while data := reader.recv(1):
            number, now = data[0], time.monotonic()
            if number not in EXIT_CODES:
                continue
            if first is None:
                first = now
            elif now - first >= SECONDS_OF_ONE_REQUEST:
                os.write(2, f"\n{signal.Signals(number).name} again: exiting at once; the newest checkpoint stays as it is\n".encode())
                os._exit(128 + number)

    thread = threading.Thread(target=watch, name="ngpt-signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()
        thread.join()
        reader.close()
