"""Rows against a plain-Python cut of the same documents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt.data.documents import JSON
from ngpt.data.packing import IGNORED, PackedRows, PaddedRows, RowShape, TokenBlock, cut_tokens

EOS, PAD = 1, 0
documents_strategy = st.lists(st.lists(st.integers(2, 50), max_size=12), min_size=1, max_size=8)


class Blocks:
    """The same documents again and again, in blocks of uneven size; state: number of the next document."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = [[*document, EOS] for document in documents]
        self.next = 0

    def next_block(self) -> TokenBlock:
        first, count = self.next, 1 + self.next % 3
        chosen = [self.documents[i % len(self.documents)] for i in range(first, first + count)]
        self.next += count
        starts = np.cumsum([0, *map(len, chosen)])
        places = [("file", first + i + 1) for i in range(count)]
        return TokenBlock(np.concatenate(chosen).astype(np.int32), starts, places, 0, lambda i: {"document": first + i})

    def state(self) -> dict[str, JSON]:
        return {"document": self.next}

    def seek(self, state: dict[str, JSON]) -> None:
        self.next = state["document"]

    def stream(self) -> Iterator[int]:
        while True:
            for document in self.documents:
                yield from document


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_packed_rows_predict_every_token_once(documents: list[list[int]], seq_len: int, counts: list[int]) -> None:
    blocks = Blocks(documents)
    rows = PackedRows(blocks, RowShape(seq_len, "pack", EOS, PAD))
    taken = [rows.take(count) for count in counts]
    total = sum(counts) * seq_len
    stream = [token for token, _ in zip(blocks.stream(), range(total + 1), strict=False)]
    assert np.concatenate([part.inputs for part in taken]).ravel().tolist() == stream[:-1]
    assert np.concatenate([part.labels for part in taken]).ravel().tolist() == stream[1:]
    assert [part.num_label_tokens for part in taken] == [count * seq_len for count in counts]


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(2, 9), st.integers(1, 12))
def test_padded_rows_hold_one_document_each(documents: list[list[int]], seq_len: int, count: int) -> None:
    part = PaddedRows(Blocks(documents), RowShape(seq_len, "pad", EOS, PAD)).take(count)
    for i in range(count):
        tokens = [*documents[i % len(documents)], EOS][:seq_len]
        padding = seq_len - len(tokens)
        assert part.inputs[i].tolist() == tokens + [PAD] * padding
        assert part.labels[i].tolist() == tokens[1:] + [IGNORED] * (padding + 1)
    assert part.num_label_tokens == int((part.labels != IGNORED).sum())


@pytest.mark.parametrize("packing", [PackedRows, PaddedRows])
@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, seq_len=st.integers(1, 9), taken=st.integers(0, 9), skipped=st.integers(0, 5))
def test_a_state_continues_at_any_row(packing: type, documents: list[list[int]], seq_len: int, taken: int, skipped: int) -> None:
    shape = RowShape(seq_len, "pack", EOS, PAD)
    rows, resumed = packing(Blocks(documents), shape), packing(Blocks(documents), shape)
    if taken:
        rows.take(taken)
    rows.skip(skipped)
    resumed.load_state(rows.state())
    assert resumed.state() == rows.state()
    expected, found = rows.take(3), resumed.take(3)
    assert found.inputs.tolist() == expected.inputs.tolist()
    assert found.labels.tolist() == expected.labels.tolist()
    assert [found.describe(i) for i in range(3)] == [expected.describe(i) for i in range(3)]


def test_masked_documents_are_numbered_within_their_row() -> None:
    rows = PackedRows(Blocks([[5, 6], [7], [8, 9, 10]]), RowShape(6, "pack", EOS, PAD, mask_documents=True)).take(2)
    assert rows.inputs.tolist() == [[5, 6, EOS, 7, EOS, 8], [9, 10, EOS, 5, 6, EOS]]
    assert rows.document_ids is not None
    assert rows.document_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]]


def test_a_packed_row_names_its_documents() -> None:
    rows = PackedRows(Blocks([[5, 6], [7], [8, 9, 10]]), RowShape(4, "pack", EOS, PAD))
    rows.take(1)
    described = rows.take(2)
    assert described.describe(0) == {"epoch": 0, "documents": ["file:2", "file:3"]}
    assert described.describe(1) == {"epoch": 0, "documents": ["file:3", "file:4"]}


def test_a_finite_run_of_tokens_is_cut_without_losing_its_end() -> None:
    rows = cut_tokens(np.arange(10, 18), RowShape(3, "pack", EOS, PAD), lambda _: {})
    assert rows.inputs.tolist() == [[10, 11, 12], [13, 14, 15], [16, PAD, PAD]]
    assert rows.labels.tolist() == [[11, 12, 13], [14, 15, 16], [17, IGNORED, IGNORED]]
    assert rows.num_label_tokens == 7
