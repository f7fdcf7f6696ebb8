"""Which rows of a global batch come from which logical stream and go to which rank, so that the order fits any number of ranks.

A global batch of B rows is S equal blocks, one of each logical stream; rank k of N gets the k-th of N contiguous parts, cut into
micro-batches, and opens only the streams that its rows come from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ngpt.data.documents import DataError
from ngpt.dist.ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """Which rows of a global batch come from which stream and go to which rank."""

    global_batch_size: int
    micro_batch_size: int
    num_streams: int
    ranks: Ranks

    def __post_init__(self) -> None:
        rows, rest = divmod(self.global_batch_size, self.ranks.world_size)
        if rest or rows % self.micro_batch_size:
            raise DataError(
                f"trainer.global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size x ranks = "
                f"{self.micro_batch_size} x {self.ranks.world_size}; change one of them"
            )

    @property
    def rows_per_stream(self) -> int:
        return self.global_batch_size // self.num_streams

    @property
    def rank_rows(self) -> range:
        """This rank's rows, as positions in the global batch."""
        count = self.global_batch_size // self.ranks.world_size
        return range(self.ranks.rank * count, (self.ranks.rank + 1) * count)

    @property
    def streams(self) -> range:
        """The streams that this rank opens."""
        rows = self.rank_rows
        return range(rows[0] // self.rows_per_stream, rows[-1] // self.rows_per_stream + 1)

    def micro_batches(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Of each micro-batch: its first row in the global batch, and (stream, number of rows) of its parts."""
        for first in self.rank_rows[:: self.micro_batch_size]:
            rows = [row // self.rows_per_stream for row in range(first, first + self.micro_batch_size)]
            yield first, [(stream, len(list(group))) for stream, group in itertools.groupby(rows)]

    def foreign_rows(self) -> tuple[int, int]:
        """Rows that other ranks have of this rank's first stream, before its own, and of its last stream, after its own."""
        return self.rank_rows[0] % self.rows_per_stream, -(self.rank_rows[-1] + 1) % self.rows_per_stream


def count_streams(global_batch_size: int, most: int) -> int:
    """Number of logical streams: the largest divisor of the global batch that is at most `most`."""
    return max(count for count in range(1, min(global_batch_size, most) + 1) if global_batch_size % count == 0)
