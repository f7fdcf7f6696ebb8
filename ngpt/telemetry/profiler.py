"""A window of the torch profiler over a few steps: a trace of every rank, and a table of what took longest, in the run folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_ROWS = 40  # of the table


class ProfilerWindow:
    """Profiles the steps from `first` on, `steps` of them: call `before` each step and `close` at the end. Nothing happens outside.

    Each rank writes `step-N.rank-R.json.gz`, which chrome://tracing and ui.perfetto.dev open, and `step-N.rank-R.txt`, the operators by
    the time that they took themselves. What fails here is warned of; training goes on.

    Args:
        folder: where the files go; made when there is something to write.
        first: the first step that is profiled; None for no window at all.
    """

    def __init__(self, folder: Path, *, first: int | None, steps: int, rank: int, device: torch.device) -> None:
        self._folder, self._first, self._steps, self._rank, self._device = folder, first, steps, rank, device
        self._profiler: Any = None
        self._begun = False

    def before(self, step: int) -> None:
        """Open the window before its first step, and close it before the one after its last."""
        if self._first is None:
            return
        if self._profiler is not None and step >= self._first + self._steps:
            self.close()
        elif not self._begun:
            if step > self._first:
                logger.warning("trainer.profile_at = %d: the run is past that step already, so there is no profile", self._first)
            self._begun = step >= self._first
            if step == self._first:
                self._open()

    def close(self) -> None:
        """Write what was profiled, if the window is open."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"step-{self._first}.rank-{self._rank}.json.gz"
            profiler.export_chrome_trace(str(trace))
            table = trace.with_name(trace.name.replace(".json.gz", ".txt"))
            table.write_text(profiler.key_averages().table(sort_by=f"self_{self._kind}_time_total", row_limit=_ROWS), encoding="utf-8")
            logger.info(
                "profile of %d steps: %s (open it in https://ui.perfetto.dev or chrome://tracing); table %s", self._steps, trace, table
            )
        except Exception as error:  # whatever the profiler raises
            self._give_up(error)

    def _open(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        try:
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        except Exception as error:
            self._profiler = None
            self._give_up(error)

    @property
    def _kind(self) -> str:
        return "cuda" if self._device.type == "cuda" else "cpu"

    def _give_up(self, error: Exception) -> None:
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("the profile of step %s could not be taken (%s); training goes on", self._first, first_line)
