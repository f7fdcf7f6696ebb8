"""What this process is doing and since when: the sign of progress that tells a long wait from a hang, and its stacks when it is one."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Where the innermost frames of a process that waits for others are.
_WAITING = (os.path.join("torch", "distributed"), os.path.join("ngpt", "dist", "collectives.py"), os.path.join("deepspeed", "comm"))
WAITING = "waiting for other ranks"
_OWN = f"{os.sep}ngpt{os.sep}"


class Activity:
    """The last sign of progress of the main thread.

    Args:
        stacks: file to which `dump` appends.
    """

    def __init__(self, stacks: Path | None = None) -> None:
        self._stacks = stacks
        self._main = threading.main_thread().ident
        self.text = "starting"
        self.signs = 0

    def now(self, text: str) -> None:
        """A sign of progress: what happens from here on."""
        self.text = text
        self.signs += 1

    def where(self) -> str:
        """What the main thread is doing, and in which line; says so where that is to wait for other ranks."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame else []
        own = [entry for entry in stack if _OWN in entry.filename]
        place = own[-1] if own else stack[-1] if stack else None
        line = f"{os.path.basename(place.filename)}:{place.lineno} ({place.name})" if place else "an unknown place"
        return f"{self.text}, {WAITING if is_waiting(stack) else 'busy'} in {line}"

    def dump(self, why: str) -> None:
        """Append the stacks of all threads to the file, if there is one."""
        if self._stacks is None:
            return
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}; this process: {self.where()}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:
            sys.stderr.write(f"the stacks could not be written: {error}\n")


def is_waiting(stack: list[traceback.FrameSummary]) -> bool:
    """Whether a stack ends in a collective: such a process waits for others."""
    return any(part in entry.filename for entry in stack[-4:] for part in _WAITING)


class HangWatch:
    """A thread that calls `on_hang` once, when `activity` has given no sign for `seconds`.

    It counts its own short waits and looks at no clock: a process that was stopped and goes on, or whose clock is set, has not hung.
    """

    def __init__(self, activity: Activity, seconds: float, on_hang: Callable[[], None]) -> None:
        self._activity = activity
        self._seconds = seconds
        self._on_hang = on_hang
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ngpt-hang", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        pause = min(1.0, self._seconds / 8)
        signs, waits = self._activity.signs, 0
        while not self._stop.wait(pause):
            waits = waits + 1 if self._activity.signs == signs else 0
            signs = self._activity.signs
            if waits * pause > self._seconds:
                self._on_hang()
                return
