"""The records of a run as TensorBoard's event files, in `tensorboard/` of the run folder: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ngpt.telemetry.metrics import Record

logger = logging.getLogger(__name__)


class TensorBoardSink:
    """Every number of a record as a scalar at the record's own step.

    A run that continues tells TensorBoard to forget what lies past its checkpoint, so that no step is drawn twice. A failure ends the
    event files with one warning, and not the run.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._folder = folder
        self._writer: Any = None
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Begin another event file, before which all records past `step` are forgotten."""
        self.close()
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=step + 1)
        except Exception as error:  # whatever it is, it must not cost the run
            self._give_up(error)

    def write(self, record: Record) -> None:
        """Add one record. It is on disk within two minutes, or when the run ends."""
        if self._writer is None:
            return
        step = int(record["step"] or 0)
        try:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, step)
        except Exception as error:  # the disk is full, the folder was removed
            self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._give_up(error)
            self._writer = None

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        logger.warning(
            "TensorBoard's event files end here (%s: %s); training goes on, metrics.jsonl has everything", type(error).__name__, error
        )
