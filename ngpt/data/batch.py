"""A batch as the model takes it, and as a person finds it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ngpt.data.documents import JSON
from ngpt.data.packing import Rows


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b rows of t tokens.

    `labels[i, j]` is the token after `input_ids[i, j]`, -100 where it is not counted; `document_ids[i, j]` numbers the documents
    of a row (with data.mask_documents). Row i has the global index `first_row + i`.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None
    first_row: int
    num_rows: int
    num_label_tokens: int
    describe_row: Callable[[int], dict[str, JSON]] = field(repr=False)

    def model_inputs(self) -> dict[str, Tensor]:
        """What the model's forward takes: input_ids, labels and, if there are any, document_ids, each (b, t) int64."""
        inputs = {"input_ids": self.input_ids, "labels": self.labels}
        return inputs if self.document_ids is None else inputs | {"document_ids": self.document_ids}

    def identity(self) -> dict[str, JSON]:
        """Which rows these are and which documents (`file:line`) they come from, JSON-able, to find a bad batch again."""
        rows = [{"row": self.first_row + i, **self.describe_row(i)} for i in range(self.num_rows)]
        return {"first_row": self.first_row, "num_rows": self.num_rows, "epoch": max(row["epoch"] for row in rows), "rows": rows}


def make_batch(parts: Sequence[Rows], *, first_row: int, pin_memory: bool = False) -> Batch:
    """Join rows of several streams into one batch of int64 tensors."""

    def tensor(arrays: list[np.ndarray]) -> Tensor:
        joined = torch.from_numpy(np.concatenate(arrays, dtype=np.int64))
        return joined.pin_memory() if pin_memory else joined

    def describe(row: int) -> dict[str, JSON]:
        for part in parts:
            if row < len(part.inputs):
                return part.describe(row)
            row -= len(part.inputs)
        raise IndexError(row)

    ids = [part.document_ids for part in parts if part.document_ids is not None]
    input_ids = tensor([part.inputs for part in parts])
    return Batch(
        input_ids=input_ids,
        labels=tensor([part.labels for part in parts]),
        document_ids=tensor(ids) if ids else None,
        first_row=first_row,
        num_rows=len(input_ids),
        num_label_tokens=sum(part.num_label_tokens for part in parts),
        describe_row=describe,
    )
