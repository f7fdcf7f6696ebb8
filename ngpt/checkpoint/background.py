"""A save in a thread: the files of this rank, then, on rank 0, the publication, once all ranks have left word of theirs.

They leave word on disk: no collective is called from the thread, as each rank's would meet training's in another order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

from ngpt.checkpoint.integrity import write_durably
from ngpt.checkpoint.tensor_file import CheckpointError, FileRecord

logger = logging.getLogger(__name__)

Records = dict[str, FileRecord]
POLL_SECONDS = 0.2
_RECEIPT = re.compile(r"written-(\d+)\.json")


class BackgroundSave:
    """A save on its way. It never raises by itself: `wait_for_files` and `wait_for_publication` do, where the caller is.

    Args:
        folder: the temporary folder, which is there.
        write: writes this rank's files.
        publish: makes a checkpoint of the folder, given the files of all ranks; None on all ranks but 0.
        ranks: whose files rank 0 waits for.
    """

    def __init__(
        self, folder: Path, *, write: Callable[[], Records], publish: Callable[[Records], None] | None, rank: int, ranks: int
    ) -> None:
        self.folder = folder
        self._write, self._publish, self._rank, self._ranks = write, publish, rank, ranks
        self._files_done, self._cancelled = threading.Event(), threading.Event()
        self._file_error: Exception | None = None
        self._publish_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def wait_for_files(self) -> None:
        """Wait until this rank's files are written. Raises OSError or CheckpointError if they are not."""
        self._files_done.wait()
        _raise(self._file_error)

    def wait_for_publication(self, timeout: float | None = None) -> bool:
        """Wait until rank 0 has published; at once on others. Returns whether that came to an end in `timeout` seconds.

        Raises:
            OSError, CheckpointError: it failed.
        """
        self._thread.join(timeout)
        _raise(self._publish_error)
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Do not publish, if that has not begun."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            records = self._write()
            receipt = {name: dataclasses.asdict(record) for name, record in records.items()}
            write_durably(self.folder / f"written-{self._rank:05d}.json", json.dumps(receipt).encode())
        except Exception as error:
            self._file_error = error
            return
        finally:
            self._write = None  # and with it the copy of weights and state
            self._files_done.set()
        if self._publish is not None:
            try:
                self._publish_when_all_have_written(self._publish)
            except Exception as error:
                self._publish_error = error

    def _publish_when_all_have_written(self, publish: Callable[[Records], None]) -> None:
        while len(receipts := self._receipts()) < self._ranks:
            if self._cancelled.wait(POLL_SECONDS):
                return
        records: Records = {}
        for receipt in receipts:
            records |= {name: FileRecord(**record) for name, record in json.loads(receipt.read_bytes()).items()}
            receipt.unlink()
        publish(records)

    def _receipts(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _RECEIPT.fullmatch(path.name)]


def _raise(error: Exception | None) -> None:
    if isinstance(error, OSError | ValueError):
        raise error
    if error is not None:  # of a kind that ranks do not tell each other of
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
