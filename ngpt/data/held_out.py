"""The fixed evaluation set: held-out documents as rows, no more than so many labels, shared out among the ranks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ngpt.data.batch import Batch, make_batch
from ngpt.data.documents import JSON
from ngpt.data.packing import IGNORED, Rows, RowShape, TokenBlock, cut_tokens, pad_documents
from ngpt.dist.ranks import Ranks


def held_out_rows(blocks: Iterable[TokenBlock], shape: RowShape, max_tokens: int) -> Rows:
    """The documents of a finite pass, in order, as rows with at most `max_tokens` labels in all."""
    documents: list[np.ndarray] = []
    counted = 0
    for block in blocks:
        for tokens in np.split(block.tokens, block.starts[1:-1]):
            documents.append(tokens)
            counted += len(tokens) if shape.packing == "pack" else min(len(tokens), shape.seq_len) - 1
        if counted > max_tokens:
            break
    if shape.packing == "pad":
        return keep_labels(pad_documents(documents, shape, _describe), max_tokens)
    return cut_tokens(np.concatenate([np.empty(0, np.int32), *documents])[: max_tokens + 1], shape, _describe)


def keep_labels(rows: Rows, most: int) -> Rows:
    """The same rows without the labels after the first `most`, and without the rows after the last label."""
    counted = rows.labels != IGNORED
    keep = counted & (np.cumsum(counted).reshape(counted.shape) <= most)
    used = int(np.flatnonzero(keep.any(axis=1))[-1]) + 1 if keep.any() else 0
    ids = None if rows.document_ids is None else rows.document_ids[:used]
    return Rows(rows.inputs[:used], np.where(keep, rows.labels, IGNORED)[:used], ids, int(keep.sum()), rows.describe)


def share_of_rank(rows: Rows, micro_batch_size: int, pad_id: int, ranks: Ranks) -> list[Batch]:
    """A contiguous part of the rows for each rank, in batches; the last part is filled up with rows that count nothing."""
    total = len(rows.inputs)
    per_rank = -(-total // ranks.world_size)
    first_row = ranks.rank * per_rank

    def part(array: np.ndarray, first: int, last: int, filler: int) -> np.ndarray:
        piece = array[first:last]
        return np.pad(piece, ((0, last - first - len(piece)), (0, 0)), constant_values=filler)

    batches = []
    for first in range(first_row, first_row + per_rank, micro_batch_size):
        last = min(first + micro_batch_size, first_row + per_rank)
        labels = part(rows.labels, first, last, IGNORED)
        ids = None if rows.document_ids is None else part(rows.document_ids, first, last, 0)
        piece = Rows(part(rows.inputs, first, last, pad_id), labels, ids, int((labels != IGNORED).sum()), rows.describe)
        batches.append(make_batch([piece], first_row=first))
    return batches


def _describe(_: int) -> dict[str, JSON]:
    return {"epoch": 0, "documents": []}
