"""Endless streams of shuffled documents: epochs, windows, and their tokenisation in blocks.

A logical stream reads its share of a source epoch after epoch. Documents are shuffled in windows of `window` documents (fewer where they
are very long); window number, source state at the window's start and position in it are the whole state (a few hundred bytes), from which
the window is read again on resume. The next window is read by another thread while this one is tokenised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from ngpt.data.documents import JSON, DataError, Document, DocumentReader, DocumentSource, Share, StreamTally
from ngpt.data.packing import TokenBlock
from ngpt.data.seeding import derive_seed, permutation

Encode = Callable[[list[str]], list[np.ndarray]]  # int32, each closed by EOS
# Documents read at a time where the order is kept, and documents tokenised at a time: enough to keep SentencePiece's threads busy,
# few enough that the first batch comes at once.
_UNSHUFFLED_WINDOW = 512
_BLOCK_DOCUMENTS = 64
# Long documents make windows and blocks end sooner: two windows of each stream are in memory, and what a block's text becomes.
_WINDOW_CHARACTERS = 2**26
_BLOCK_CHARACTERS = 2**24


@dataclass(frozen=True)
class Window:
    """Consecutive documents of an epoch in the order they are given out; `source` and `skipped` are from before the first was read."""

    documents: list[Document]
    epoch: int
    number: int
    source: JSON
    skipped: dict[str, int]

    def state_of(self, position: int) -> dict[str, JSON]:
        return {"epoch": self.epoch, "window": self.number, "position": position, "source": self.source, "skipped": self.skipped}


class _WindowReader:
    """Reads one window after the other, epoch after epoch; used by one thread at a time."""

    def __init__(self, source: DocumentSource, share: Share, *, window: int, tally: StreamTally) -> None:
        self._source = source
        self._share = share
        self._shuffled = window > 1
        self._size = window if self._shuffled else _UNSHUFFLED_WINDOW
        self._tally = tally
        self._epoch, self._number = 0, 0
        self._reader: DocumentReader | None = None

    def seek(self, epoch: int, number: int, source_state: JSON, skipped: dict[str, int]) -> None:
        self._epoch, self._number = epoch, number
        self._tally.restore(skipped)
        self._reader = self._open(source_state)

    def __call__(self) -> Window:
        """The next window. Raises DataError if an epoch has no documents at all."""
        while True:
            if self._reader is None:
                self._reader = self._open(None)
            source, skipped = self._reader.state(), self._tally.counts()
            documents = take_documents(self._reader, self._size, _WINDOW_CHARACTERS)
            if documents:
                break
            if self._number == 0:
                raise DataError(
                    f"stream {self._share.stream} of {self._share.num_streams} has no usable document in its files "
                    f"({self._tally.bad} bad, {self._tally.empty} empty); give non-empty files, or fewer data.streams"
                )
            self._epoch, self._number, self._reader = self._epoch + 1, 0, None
            self._tally.restore({"bad": 0, "empty": 0})
        if self._shuffled:
            documents = [documents[i] for i in permutation(len(documents), self._seed("window", self._epoch, self._number))]
        window = Window(documents, self._epoch, self._number, source, skipped)
        self._number += 1
        return window

    def _open(self, source_state: JSON) -> DocumentReader:
        seed = self._seed("shards", self._epoch) if self._shuffled else None
        share = Share(self._share.split, self._share.stream, self._share.num_streams, seed)
        return self._source.open(share, source_state, self._tally)

    def _seed(self, *parts: object) -> int:
        return derive_seed(self._share.seed, self._share.stream, *parts)


class TextBlocks:
    """A logical stream as blocks of tokens (a `packing.BlockSource`).

    `share.seed` is the seed of the whole data order. Documents that carry tokens already are taken as they are.
    """

    def __init__(
        self, source: DocumentSource, share: Share, encode: Encode, *, eos_id: int, window: int, tally: StreamTally, executor: Executor
    ) -> None:
        self._encode = encode
        self._eos_id = eos_id
        self._executor = executor
        self._read = _WindowReader(source, share, window=window, tally=tally)
        self._window: Window | None = None
        self._upcoming: Future[Window] | None = None
        self._position = 0
        self._start: dict[str, JSON] = {"epoch": 0, "window": 0, "position": 0, "source": None, "skipped": tally.counts()}

    def prepare(self) -> None:
        """Begin to read the window that `next_block` will need first, so that a rank's streams do so side by side."""
        if self._window is None and self._upcoming is None:
            self._upcoming = self._executor.submit(self._read)

    def next_block(self) -> TokenBlock:
        window = self._current_window()
        first = self._position
        documents = take_documents(itertools.islice(window.documents, first, None), _BLOCK_DOCUMENTS, _BLOCK_CHARACTERS)
        self._position += len(documents)
        return make_block(documents, self._encode, self._eos_id, window.epoch, lambda i: window.state_of(first + i))

    def state(self) -> dict[str, JSON]:
        if self._window is None:
            return self._start
        return self._current_window().state_of(self._position)

    def seek(self, state: dict[str, JSON]) -> None:
        if self._upcoming is not None and not self._upcoming.cancel():
            self._upcoming.exception()
        self._upcoming, self._window, self._start = None, None, state
        self._read.seek(state["epoch"], state["window"], state["source"], state["skipped"])
        self._position = state["position"]

    def _current_window(self) -> Window:
        """The window that holds the next document."""
        if self._window is None:
            self._enter_next_window()
        elif self._position == len(self._window.documents):
            self._position = 0
            self._enter_next_window()
        assert self._window is not None
        return self._window

    def _enter_next_window(self) -> None:
        upcoming = self._upcoming or self._executor.submit(self._read)
        self._window = upcoming.result()
        self._upcoming = self._executor.submit(self._read)


def take_documents(documents: Iterator[Document], count: int, characters: int) -> list[Document]:
    """The next documents, at most `count`, and none after those that have `characters` of text together."""
    taken: list[Document] = []
    for document in itertools.islice(documents, count):
        taken.append(document)
        characters -= len(document.text)
        if characters <= 0:
            break
    return taken


def make_block(
    documents: list[Document], encode: Encode, eos_id: int, epoch: int, state_of: Callable[[int], dict[str, JSON]]
) -> TokenBlock:
    """Tokenise documents, each closed by EOS."""
    if documents[0].tokens is None:
        pieces = encode([document.text for document in documents])
    else:
        pieces = [np.append(document.tokens, eos_id) for document in documents if document.tokens is not None]
    tokens = np.concatenate(pieces, dtype=np.int32, casting="same_kind")
    starts = np.cumsum([0, *map(len, pieces)])
    return TokenBlock(tokens, starts, [(document.file, document.line) for document in documents], epoch, state_of)


def read_in_order(reader: DocumentReader, encode: Encode, eos_id: int) -> Iterator[TokenBlock]:
    """One pass over a reader's documents as blocks, for evaluation and preparation; they have no state."""
    while batch := take_documents(reader, _BLOCK_DOCUMENTS, _BLOCK_CHARACTERS):
        yield make_block(batch, encode, eos_id, 0, lambda _: {})
