"""Documents, the interface of their sources, and the account of those that had to be skipped."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]
JSON = Any  # what json.dumps accepts


class DataError(ValueError):
    """A problem with text, tokens or their files that the user can solve; the message says where and how."""


class DataUnavailable(DataError):
    """Data that could be read before and cannot now, as the network or its source is away: time may solve it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document and where it came from: `line` counts from 1. `tokens` is set where the source is tokenised already."""

    text: str
    file: str
    line: int
    tokens: np.ndarray | None = None


class StreamTally:
    """Documents that one logical stream skipped in its current epoch."""

    def __init__(self, account: SkippedDocuments) -> None:
        self._account = account
        self.bad = 0
        self.empty = 0

    def skip_bad(self, file: str, line: int, reason: str) -> None:
        """Count and log a bad document. Raises DataError if the limit is exceeded now."""
        self._account.record_bad(self, f"{file}:{line}: {reason}")

    def skip_empty(self) -> None:
        """Count a document without text: skipped, but not held against the limit."""
        self._account.record_empty(self)

    def counts(self) -> dict[str, int]:
        """What a state keeps, so that a document read again after a resume is not counted again."""
        return {"bad": self.bad, "empty": self.empty}

    def restore(self, counts: dict[str, int]) -> None:
        self.bad, self.empty = counts["bad"], counts["empty"]


class SkippedDocuments:
    """The account of a process: totals for telemetry, and the limit on bad documents per pass over the data.

    The limit holds for the sum over this process's streams, each counted in its current epoch: a run of many epochs does not
    fail on the same few documents. Thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.totals = {"bad_documents": 0, "empty_documents": 0}
        self._lock = threading.Lock()
        self._tallies: dict[int, StreamTally] = defaultdict(lambda: StreamTally(self))

    def tally(self, stream: int = 0) -> StreamTally:
        return self._tallies[stream]

    def record_bad(self, tally: StreamTally, message: str) -> None:
        with self._lock:
            tally.bad += 1
            self.totals["bad_documents"] += 1
            bad = sum(each.bad for each in self._tallies.values())
        logger.warning("skipped a bad document: %s", message)
        if bad > self.limit:
            raise DataError(
                f"{bad} bad documents, more than data.max_bad_documents={self.limit}; the last one is {message}. "
                "Repair the files, or raise data.max_bad_documents"
            )

    def record_empty(self, tally: StreamTally) -> None:
        with self._lock:
            tally.empty += 1
            self.totals["empty_documents"] += 1


class DocumentReader(ABC, Iterator[Document]):
    """One pass over one stream's share of the documents. Subclasses are a generator and the position that it keeps in attributes."""

    def __next__(self) -> Document:
        return next(self._reading)

    @cached_property
    def _reading(self) -> Iterator[Document]:
        return self._read()

    @abstractmethod
    def _read(self) -> Iterator[Document]:
        """The documents from the position on; called once."""

    @abstractmethod
    def state(self) -> JSON:
        """Where the next document will be read, for `DocumentSource.open`."""


@dataclass(frozen=True)
class Share:
    """Which documents a reader gives: those of stream `stream` of `num_streams`, shards shuffled by `seed` (None: in order)."""

    split: Split
    stream: int = 0
    num_streams: int = 1
    seed: int | None = None


class DocumentSource(Protocol):
    """A collection of documents in shards that streams share out among themselves."""

    def num_shards(self, split: Split) -> int:
        """How many streams can have a share of their own."""
        ...

    def fingerprint(self, split: Split) -> str:
        """Changes when a saved position would no longer point at the same document."""
        ...

    def open(self, share: Share, state: JSON, tally: StreamTally) -> DocumentReader:
        """A reader at `state` (None: the beginning)."""
        ...


def check_text(text: object) -> str | None:
    """What is wrong with a document's text, or None. Lone surrogates are legal in JSON and impossible in UTF-8."""
    if not isinstance(text, str):
        return "no field `text`" if text is None else f"`text` is {type(text).__name__}, not a string"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"`text` has a lone surrogate at character {error.start}"
    return None
