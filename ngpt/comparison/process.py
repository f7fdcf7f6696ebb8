"""One run as a process of its own: started, asked to stop when we are, and found again when it outlived a command that was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from ngpt.dist.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN

TRAINER = "ngpt.train"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def train_command(launcher: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The command that trains: `launcher` (nothing: this Python) with the trainer's module in that launcher's words, and `overrides`.

    A script ending in .sh, as those of launch/, starts the trainer itself.
    """
    if launcher and launcher[-1].endswith(".sh"):
        return [*launcher, *overrides]
    deepspeed = any(Path(word).name == "deepspeed" or word.startswith("deepspeed.launcher") for word in launcher)
    return [*(launcher or [sys.executable]), "--module" if deepspeed else "-m", TRAINER, *overrides]


class Stop:
    """Signals to this process: the first one is passed on to the run, which saves; the second one kills it."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.process: psutil.Process | None = None

    @property
    def exit_code(self) -> int:
        """Of a command that was stopped."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_TRY_AGAIN

    def __call__(self, number: int, _frame: FrameType | None = None) -> None:
        again, self.signal = self.signal is not None, signal.Signals(number)
        if self.process is None:
            return
        try:
            if again:
                kill(self.process)
            else:
                sys.stdout.write(f"{self.signal.name}: the run saves, then this stops (again to stop at once)\n")
                sys.stdout.flush()
                _trainer_below(self.process).send_signal(signal.SIGTERM)  # which, unlike SIGINT, launchers pass on at once
        except psutil.Error:
            pass  # it has just ended


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A Stop that has the signals while the body runs."""
    stop = Stop()
    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start(command: Sequence[str], errors: Path) -> subprocess.Popen[bytes]:
    """Start `command`; what it says goes to our standard output, and what goes wrong to the file `errors`.

    It has a session of its own: Ctrl-C reaches us alone, and we pass it on once. (Twice would end the run without saving.)
    """
    with errors.open("ab") as file:
        return subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stderr=file, start_new_session=True)


def left_behind(overrides: Sequence[str]) -> psutil.Process | None:
    """The process of this folder that has all of `overrides` on its command line, if there is one: a comparison was killed and it was not.

    Of a launcher and its ranks it is the launcher.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if set(overrides) <= set(process.cmdline()) and process.cwd() == str(Path.cwd()):
                found.append(process)
        except psutil.Error:
            continue  # it has ended, or is somebody else's
    return min(found, key=lambda process: process.create_time(), default=None)


def kill(process: psutil.Process) -> None:
    """End a process and all that it started, at once."""
    for each in [process, *process.children(recursive=True)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def _trainer_below(process: psutil.Process) -> psutil.Process:
    """Who is to be asked to stop: one rank, which tells the others; or the process itself where it is the trainer or has none here."""
    ranks = [child for child in process.children(recursive=True) if _is_rank(child)]
    return min(ranks, key=lambda rank: rank.create_time(), default=process)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ() and TRAINER in " ".join(process.cmdline())
    except psutil.Error:
        return False
