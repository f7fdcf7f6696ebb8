"""A rank of bench/soak.py: `ngpt.train` as it is, and beside it a record of what each step was made of and of what the rank is doing.

Where SOAK_RECORDS says, every start of every rank leaves a file: the step it goes on from, then a line a step with the rows of its batches
(their places, and a checksum of the tokens of each), the loss to the last bit, and the resident set. A line is written after its
update and before anything is saved, so that a checkpoint never holds a step without a line.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil

import ngpt.run
from ngpt.data.batch import Batch
from ngpt.dist.activity import Activity
from ngpt.loop.train_step import StepResult
from ngpt.train import main

LONGEST_ACTIVITY = 160  # bytes of the file that says what a rank is doing


def checksums(batch: Batch) -> tuple[int, list[int]]:
    """The place of a batch's first row in the whole stream, and a checksum of the tokens and labels of each row."""
    return batch.first_row, [
        zlib.crc32(labels.numpy().tobytes(), zlib.crc32(tokens.numpy().tobytes()))
        for tokens, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]


def _watch(folder: Path, start: str, rank: str) -> None:
    records = os.open(folder / f"start-{start}.rank-{rank}.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    activity = os.open(folder / f"activity.rank-{rank}", os.O_CREAT | os.O_RDWR, 0o644)
    process = psutil.Process()
    steps, record, now = ngpt.run.Run.steps, ngpt.run.Run.record, Activity.now

    def write(entry: dict[str, object]) -> None:
        os.write(records, json.dumps(entry).encode() + b"\n")  # not kept in memory, which a kill would lose

    def watched_steps(self: ngpt.run.Run) -> Iterator[StepResult]:
        write({"from": self.progress.step, "tokens": self.progress.tokens, "ranks": self.ranks.world_size})
        return steps(self)

    def watched_record(self: ngpt.run.Run, result: StepResult) -> None:
        rows = [checksums(batch) for batch in result.batches]
        entry = {"step": result.step, "tokens": result.tokens, "loss": result.update.loss.hex(), "rows": rows}
        write(entry | {"resident": process.memory_info().rss})
        record(self, result)

    def watched_now(self: Activity, text: str) -> None:
        now(self, text)
        os.pwrite(activity, f"{start} {os.getpid()} {text}".encode().ljust(LONGEST_ACTIVITY)[:LONGEST_ACTIVITY], 0)

    ngpt.run.Run.steps, ngpt.run.Run.record, Activity.now = watched_steps, watched_record, watched_now
    os.pwrite(activity, f"{start} {os.getpid()} starting".encode().ljust(LONGEST_ACTIVITY), 0)


if __name__ == "__main__":
    _watch(Path(os.environ["SOAK_RECORDS"]), os.environ["SOAK_START"], os.environ.get("RANK", "0"))
    main()
