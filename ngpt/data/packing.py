"""Documents to rows of equal length: `pack` wastes nothing, `pad` is the published benchmark's protocol.

A row source keeps no tokens in its state: only the document that holds the next row's first token, and the offset in it. Documents
from there on are tokenised again on resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from ngpt.data.documents import JSON

IGNORED = -100


@dataclass(frozen=True)
class TokenBlock:
    """Some consecutive documents of a stream as one array of tokens, each document closed by EOS.

    `starts` (documents + 1,) are offsets into `tokens`, strictly increasing; `state_of(i)` is the stream's state at document i.
    """

    tokens: np.ndarray
    starts: np.ndarray
    places: list[tuple[str, int]]
    epoch: int
    state_of: Callable[[int], dict[str, JSON]]


class BlockSource(Protocol):
    """An endless stream of documents as token blocks."""

    def next_block(self) -> TokenBlock: ...

    def state(self) -> dict[str, JSON]:
        """The state of the first document of the next block."""
        ...

    def seek(self, state: dict[str, JSON]) -> None:
        """Make the document of `state` the first one of the next block."""
        ...


@dataclass(frozen=True)
class Rows:
    """n rows of t tokens. inputs, labels (already shifted; -100: not counted), document_ids: (n, t) integers of any width."""

    inputs: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray | None
    num_label_tokens: int
    describe: Callable[[int], dict[str, JSON]] = field(repr=False)


@dataclass(frozen=True)
class RowShape:
    """How documents become rows of `seq_len` tokens: `packing` is pack or pad; only packed rows can mask documents."""

    seq_len: int
    packing: str
    eos_id: int
    pad_id: int
    mask_documents: bool = False


class RowSource(Protocol):
    """One logical stream of rows. A state describes the position after the rows taken or skipped so far."""

    def take(self, count: int) -> Rows: ...

    def skip(self, count: int) -> None: ...

    def state(self) -> dict[str, JSON]: ...

    def load_state(self, state: dict[str, JSON]) -> None: ...


def document_ids(inputs: np.ndarray, shape: RowShape) -> np.ndarray | None:
    """(n, t): which document of its row each token belongs to, from 0; an EOS belongs to the document that it closes.

    None where documents are not masked.
    """
    if not shape.mask_documents:
        return None
    closes = inputs == shape.eos_id
    return np.cumsum(closes, axis=1) - closes


def _describe_packed(blocks: list[TokenBlock], offset: int, seq_len: int, row: int) -> dict[str, JSON]:
    """Epochs and documents that row `row` of a take that began at `offset` of blocks[0] has tokens of."""
    first, end = offset + row * seq_len, offset + (row + 1) * seq_len
    documents, epochs = [], []
    for block in blocks:
        if first < len(block.tokens) and end > 0:
            lowest = int(np.searchsorted(block.starts, max(first, 0), side="right")) - 1
            highest = int(np.searchsorted(block.starts, min(end, len(block.tokens)), side="left"))
            documents += [f"{file}:{line}" for file, line in block.places[lowest:highest]]
            epochs.append(block.epoch)
        first, end = first - len(block.tokens), end - len(block.tokens)
    return {"epoch": max(epochs), "documents": documents}


class PackedRows:
    """The token stream cut in pieces of seq_len + 1 with stride seq_len: every token is predicted exactly once, none is padding."""

    def __init__(self, blocks: BlockSource, shape: RowShape) -> None:
        self._source = blocks
        self._shape = shape
        self._seq_len = shape.seq_len
        self._blocks: list[TokenBlock] = []
        self._offset = 0
        self._available = 0

    def take(self, count: int) -> Rows:
        blocks = self._hold(count)
        pieces, wanted, offset = [], count * self._seq_len + 1, self._offset
        for block in blocks:
            pieces.append(block.tokens[offset : offset + wanted])
            wanted, offset = wanted - len(pieces[-1]), 0
            if not wanted:
                break
        tokens = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        inputs, labels = (part.reshape(count, self._seq_len) for part in (tokens[:-1], tokens[1:]))
        describe = partial(_describe_packed, blocks[: len(pieces)], self._offset, self._seq_len)
        self._advance(count)
        return Rows(inputs, labels, document_ids(inputs, self._shape), labels.size, describe)

    def skip(self, count: int) -> None:
        for _ in range(count):
            self._hold(1)
            self._advance(1)

    def state(self) -> dict[str, JSON]:
        if not self._blocks:
            return self._source.state() | {"offset": self._offset}
        block = self._blocks[0]
        document = int(np.searchsorted(block.starts, self._offset, side="right")) - 1
        return block.state_of(document) | {"offset": self._offset - int(block.starts[document])}

    def load_state(self, state: dict[str, JSON]) -> None:
        self._source.seek(state)
        self._blocks, self._offset = [], state["offset"]
        self._available = -self._offset

    def _hold(self, rows: int) -> list[TokenBlock]:
        """All blocks read and not yet used up, after reading as many as `rows` rows need."""
        while self._available < rows * self._seq_len + 1:
            block = self._source.next_block()
            self._blocks.append(block)
            self._available += len(block.tokens)
        return self._blocks

    def _advance(self, rows: int) -> None:
        self._offset += rows * self._seq_len
        self._available -= rows * self._seq_len
        while self._offset >= len(self._blocks[0].tokens):
            # A new list: `describe` of the rows handed out still looks at the old one.
            self._offset, self._blocks = self._offset - len(self._blocks[0].tokens), self._blocks[1:]


def pad_documents(documents: list[np.ndarray], shape: RowShape, describe: Callable[[int], dict[str, JSON]]) -> Rows:
    """One row per document: its first `seq_len` tokens, then padding; labels are -100 on padding and at a row's last token."""
    inputs = np.full((len(documents), shape.seq_len), shape.pad_id, dtype=np.int32)
    labels = np.full((len(documents), shape.seq_len), IGNORED, dtype=np.int32)
    counted = 0
    for row, tokens in enumerate(documents):
        tokens = tokens[: shape.seq_len]
        inputs[row, : len(tokens)] = tokens
        labels[row, : len(tokens) - 1] = tokens[1:]
        counted += len(tokens) - 1
    return Rows(inputs, labels, None, counted, describe)


def cut_tokens(tokens: np.ndarray, shape: RowShape, describe: Callable[[int], dict[str, JSON]]) -> Rows:
    """A finite run of tokens as packed rows; only the last row is padded, with labels -100. Every token but the first is a label."""
    count = max(0, len(tokens) - 1)
    rows = -(-count // shape.seq_len)
    inputs = np.full(rows * shape.seq_len, shape.pad_id, dtype=np.int32)
    labels = np.full(rows * shape.seq_len, IGNORED, dtype=np.int32)
    inputs[:count] = tokens[:count]
    labels[:count] = tokens[1:]
    inputs = inputs.reshape(rows, shape.seq_len)
    return Rows(inputs, labels.reshape(rows, shape.seq_len), document_ids(inputs, shape), count, describe)


class PaddedRows:
    """One document a row: its first seq_len tokens (the closing EOS included), padded; labels are -100 on padding and at the end."""

    def __init__(self, blocks: BlockSource, shape: RowShape) -> None:
        self._source = blocks
        self._shape = shape
        self._block: TokenBlock | None = None
        self._next = 0

    def take(self, count: int) -> Rows:
        origins = [self._next_document() for _ in range(count)]

        def describe(row: int) -> dict[str, JSON]:
            block, document = origins[row]
            file, line = block.places[document]
            return {"epoch": block.epoch, "documents": [f"{file}:{line}"]}

        documents = [block.tokens[block.starts[i] : block.starts[i + 1]] for block, i in origins]
        return pad_documents(documents, self._shape, describe)

    def skip(self, count: int) -> None:
        for _ in range(count):
            self._next_document()

    def state(self) -> dict[str, JSON]:
        if self._block is None or self._next == len(self._block.places):
            return self._source.state() | {"offset": 0}
        return self._block.state_of(self._next) | {"offset": 0}

    def load_state(self, state: dict[str, JSON]) -> None:
        self._source.seek(state)
        self._block = None

    def _next_document(self) -> tuple[TokenBlock, int]:
        if self._block is None or self._next == len(self._block.places):
            self._block, self._next = self._source.next_block(), 0
        self._next += 1
        return self._block, self._next - 1


def rows_of_blocks(blocks: BlockSource, shape: RowShape) -> RowSource:
    """The rows of a stream of documents, packed or padded as `shape` says."""
    return PaddedRows(blocks, shape) if shape.packing == "pad" else PackedRows(blocks, shape)
