"""The runs of a comparison, one after the other: what is done is left alone, what is not goes on, what fails does not stop the others."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from ngpt.comparison import process
from ngpt.comparison.arms import Arm
from ngpt.comparison.ledger import Ledger, RunState
from ngpt.comparison.results import result_of
from ngpt.config.durations import clock
from ngpt.config.redaction import redact, redact_argument
from ngpt.dist.exit_codes import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_TRY_AGAIN
from ngpt.report.runs import ReportError, read_run

_MOST_WORDS = 400  # of an error that are repeated


class Conductor:
    """Takes the runs of a ledger to their ends.

    Args:
        folder: of the comparison; the runs' are in it.
        launcher: the words before the trainer's module; none: this Python, one process.
        say: where lines for the user go.
    """

    def __init__(self, folder: Path, arms: Sequence[Arm], ledger: Ledger, launcher: Sequence[str], say: Callable[[str], None]) -> None:
        self._folder, self._ledger, self._launcher, self._say = folder, ledger, launcher, say
        self._arms = {arm.label: arm for arm in arms}
        self._runs = ledger.runs

    def plan(self) -> str:
        """One line before anything starts: how many runs, and what is known of the time."""
        done = sum(run.status == "done" for run in self._runs)
        over = sum(run.is_over for run in self._runs)
        seeds = len({run.seed for run in self._runs})
        line = f"{len(self._arms)} arms x {seeds} seed{'s' if seeds > 1 else ''} = {len(self._runs)} runs in {self._folder}"
        if over:
            line += f", {done} done" + (f", {over - done} diverged" if over > done else "")
        return f"{line}; {self._time_left()}"

    def command(self, run: RunState) -> list[str]:
        """What starts `run`."""
        return process.train_command(self._launcher, [*self._arms[run.arm].overrides, *self._own(run)])

    def _own(self, run: RunState) -> list[str]:
        """The overrides by which this run differs from all others."""
        arm = self._arms[run.arm]
        ours = [f"seed={run.seed}", f"run.dir={_quoted(str(self._folder))}", f"run.name={run.name}", "resume=auto"]
        group = [f"logger.group={_quoted(self._folder.name)}"] if arm.config.logger.group is None else []
        return [*group, *ours]

    def conduct(self) -> int:
        """Do what is left to do. Returns the exit code: 0, that of the first run that failed, or that of a signal."""
        with process.stop_on_signals() as stop:
            for number, run in enumerate(self._runs, 1):
                if stop.signal is not None:
                    return stop.exit_code
                if run.is_over:
                    continue
                where = f"[{number}/{len(self._runs)}] {run.arm}, seed {run.seed}"
                self._do(run, where, stop)
                if run.status == "stopped":
                    return stop.exit_code if stop.signal is not None else run.exit_code or EXIT_TRY_AGAIN
        failed = next((run for run in self._runs if run.status == "failed"), None)
        return 0 if failed is None else max(failed.exit_code or 1, 1)

    def _do(self, run: RunState, where: str, stop: process.Stop) -> None:
        errors = self._folder / f"{run.name}.stderr"
        began, before = time.monotonic(), run.seconds
        command = self.command(run)
        outlived = process.left_behind(command[-len(self._own(run)) :]) if run.status == "running" else None
        if outlived:
            self._say(f"{where}: process {outlived.pid} still trains it, left by a comparison that was killed; waiting for its end")
            stop.process = outlived
            outlived.wait()
            run.exit_code = None
        else:
            self._say(f"{where}: {shlex.join(map(redact_argument, command))}")
            run.status, run.starts = "running", run.starts + 1
            self._ledger.write()  # before it starts, so that no run is ever unknown
            child = process.start(command, errors)
            stop.process = psutil.Process(child.pid)
            run.exit_code = child.wait()
        stop.process = None
        run.seconds = before + time.monotonic() - began
        self._conclude(run, where, stopped=stop.signal is not None, errors=errors)
        self._ledger.write()
        if outlived and run.status == "failed" and run.exit_code is None:
            self._do(run, where, stop)  # its own command never learnt why it ended: it goes on from its checkpoint

    def _conclude(self, run: RunState, where: str, *, stopped: bool, errors: Path) -> None:
        """What has become of a run that has ended."""
        took = f"in {clock(run.seconds)}"
        try:
            result = result_of(read_run(self._folder / run.name), self._arms[run.arm], run.seed)
            incomplete = ""
        except ReportError as error:
            result, incomplete = None, str(error)
        if result is not None and run.exit_code in (0, None):
            run.status, run.said = "done", ""
            errors.unlink(missing_ok=True)
            self._say(f"{where}: held-out loss {result.loss:.4f} {took}; {self._time_left()}")
        elif stopped or run.exit_code in (EXIT_TRY_AGAIN, EXIT_INTERRUPTED):
            run.status = "stopped"
            self._say(f"{where}: stopped after {clock(run.seconds)}; the same command goes on")
        else:
            run.status = "failed"
            run.said = _last_words(errors) or incomplete
            how = _ending(run.exit_code)
            self._say(f"{where}: {how} {took}: {run.said}\n  the others go on; {_remedy(run, self._folder, errors)}")

    def _time_left(self) -> str:
        """From the runs that are done: of the same arm, or of all."""
        left = [run for run in self._runs if not run.is_over]
        if not left:
            return "nothing left to run"
        measured = {arm: [run.seconds for run in self._runs if run.status == "done" and run.arm == arm] for arm in self._arms}
        known = [seconds for of_arm in measured.values() for seconds in of_arm]
        if not known:
            return "the time is known once one has finished"
        needed = (measured[run.arm] or known for run in left)
        seconds = sum(max(0.0, sum(of_run) / len(of_run) - run.seconds) for of_run, run in zip(needed, left, strict=True))
        return f"about {clock(seconds)} left for {len(left)} run{'s' if len(left) > 1 else ''}"


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "ended unfinished"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return {0: "ended without a result", EXIT_DIVERGED: "diverged (exit code 3)"}.get(exit_code, f"failed with exit code {exit_code}")


def _remedy(run: RunState, folder: Path, errors: Path) -> str:
    if run.exit_code == EXIT_DIVERGED:
        return f"the same command leaves it as it is; remove {folder / run.name} and its entry in comparison.json to repeat it"
    return f"the same command tries it again; all that it said is in {errors}"


def _last_words(errors: Path) -> str:
    """The end of what went wrong, on one line: all of a message of ours, of a traceback the last line."""
    try:
        text = redact(errors.read_text(encoding="utf-8", errors="replace")).strip()
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.rpartition("\n\n")[2].splitlines() if line.strip()]
    if "Traceback (most recent call last):" in text or len(lines) > 6:
        lines = lines[-1:]
    return " ".join(lines)[-_MOST_WORDS:]


def _quoted(value: str) -> str:
    """A text as Hydra reads it back, whatever characters it has."""
    if all(character.isalnum() or character in "/._-" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
