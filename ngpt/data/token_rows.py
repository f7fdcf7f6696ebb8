"""Rows of token shards in a random order that needs no memory of what came before: the state is a number.

Rows are shuffled twice: in chunks of 64 consecutive rows over the whole data, and singly in windows of `window` rows. Reads stay long
enough for disks, a batch still mixes all of the data, and any rank can jump to any row.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ngpt.data.documents import JSON, DataError
from ngpt.data.packing import IGNORED, Rows, RowShape, document_ids
from ngpt.data.seeding import derive_seed, permutation
from ngpt.data.token_shards import TokenStore

_CHUNK_ROWS = 64


class RowOrder:
    """A seeded order of `count` rows, looked up window by window. `window` 0 or 1: the order of the data."""

    def __init__(self, count: int, *, window: int, seed: int) -> None:
        self._count = count
        self._window = window
        self._seed = seed
        self._chunks = np.empty(0, np.int64)
        self._epoch = -1
        self._cached: tuple[int, int, np.ndarray] = (-1, -1, self._chunks)

    def rows(self, epoch: int, first: int, count: int) -> np.ndarray:
        """The rows at positions first ... first + count - 1 of an epoch, all below the number of rows."""
        if self._window <= 1:
            return np.arange(first, first + count)
        pieces = []
        while count:
            window, offset = divmod(first, self._window)
            piece = self._window_rows(epoch, window)[offset : offset + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def _window_rows(self, epoch: int, window: int) -> np.ndarray:
        if self._cached[:2] != (epoch, window):
            first = window * self._window
            shuffled = permutation(min(self._window, self._count - first), derive_seed(self._seed, "window", epoch, window))
            chunk, within = np.divmod(first + shuffled, _CHUNK_ROWS)
            self._cached = (epoch, window, self._chunk_order(epoch)[chunk] * _CHUNK_ROWS + within)
        return self._cached[2]

    def _chunk_order(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            whole = self._count // _CHUNK_ROWS
            # The last chunk may be short, so it stays where it is.
            self._chunks = np.append(permutation(whole, derive_seed(self._seed, "chunks", epoch)), whole)
            self._epoch = epoch
        return self._chunks


class TokenizedRows:
    """Packed rows of token shards (a `packing.RowSource`): all tokens one after the other, cut with stride seq_len.

    `holdout`: (n, True) for every n-th row only, (n, False) for all others, None for all. The very last row may be padded.
    Raises DataError if there is no row.
    """

    def __init__(
        self,
        store: TokenStore,
        shape: RowShape,
        *,
        holdout: tuple[int, bool] | None,
        window: int,
        seed: int,
    ) -> None:
        self._store = store
        self._shape = shape
        self._seq_len = seq_len = shape.seq_len
        self._holdout = holdout
        total = -(-(len(store) - 1) // seq_len) if len(store) > 1 else 0
        held_out = total // holdout[0] if holdout else 0
        self.num_rows = total if holdout is None else held_out if holdout[1] else total - held_out
        if not self.num_rows:
            raise DataError(f"the token shards hold {len(store)} tokens: no row of {seq_len} for this split; give more, or data.val_files")
        self._order = RowOrder(self.num_rows, window=window, seed=seed)
        self._epoch, self._position = 0, 0

    def take(self, count: int) -> Rows:
        tokens = np.full((count, self._seq_len + 1), self._shape.pad_id, dtype=np.int32)
        positions, epochs = self._next_positions(count)
        missing = [(row, got) for row, first in enumerate(positions) if (got := self._store.read_into(tokens[row], first)) <= self._seq_len]
        labels = tokens[:, 1:]
        if missing:
            labels = labels.copy()
            for row, got in missing:
                labels[row, got - 1 :] = IGNORED
        inputs = tokens[:, :-1]
        counted = labels.size - sum(self._seq_len + 1 - got for _, got in missing)
        return Rows(inputs, labels, document_ids(inputs, self._shape), counted, partial(_describe, self._store, positions, epochs))

    def skip(self, count: int) -> None:
        epochs, self._position = divmod(self._position + count, self.num_rows)
        self._epoch += epochs

    def state(self) -> dict[str, JSON]:
        return {"epoch": self._epoch, "row": self._position}

    def load_state(self, state: dict[str, JSON]) -> None:
        self._epoch, self._position = state["epoch"], state["row"]

    def _next_positions(self, count: int) -> tuple[list[int], list[int]]:
        """First token and epoch of each of the next rows."""
        positions: list[int] = []
        epochs: list[int] = []
        while len(positions) < count:
            part = min(count - len(positions), self.num_rows - self._position)
            rows = self._order.rows(self._epoch, self._position, part)
            if self._holdout is not None:
                every, held_out = self._holdout
                rows = rows * every + every - 1 if held_out else rows + rows // (every - 1)
            positions += (rows * self._seq_len).tolist()
            epochs += [self._epoch] * part
            self.skip(part)
        return positions, epochs


def _describe(store: TokenStore, positions: list[int], epochs: list[int], row: int) -> dict[str, JSON]:
    return {"epoch": epochs[row], "documents": [store.place(positions[row])]}
