"""Text streamed from the Hugging Face hub through `datasets`, with retries that lose and repeat nothing."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from ngpt.data.documents import JSON, DataError, DataUnavailable, Document, DocumentReader, Share, Split, StreamTally, check_text
from ngpt.data.hub_client import HubBusy, is_of_network_package, is_passing_status, prepare_libraries, seconds_asked
from ngpt.data.seeding import permutation

if TYPE_CHECKING:
    from datasets import IterableDataset

    OpenShard: TypeAlias = Callable[[int], IterableDataset]

logger = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 60.0
# The position of `datasets` is taken once in so many rows: the call costs more than a row.
_ROWS_PER_POSITION = 256
# A machine without a network should hear so soon. A hub that is there and busy is asked as often as anywhere.
_RETRIES_OF_REACHING = 3


class Retries:
    """How often and how long to wait for the hub: exponential backoff with jitter. Counts all retries of the process."""

    def __init__(self, most: int, first_wait_seconds: float) -> None:
        self.most = most
        self.first_wait_seconds = first_wait_seconds
        self.count = 0
        self.stop = threading.Event()

    def wait(self, attempt: int, most: int, error: Exception, what: str) -> None:
        """Sleep before retry number `attempt` (from 1) of at most `most` at `what`. Raises DataUnavailable if there are to be no more."""
        if attempt > most or self.stop.is_set():
            raise DataUnavailable(f"{what}: {_explain(error)} (retried {attempt - 1} times). {_offline_advice()}") from error
        self.count += 1
        seconds = min(_LONGEST_WAIT_SECONDS, self.first_wait_seconds * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        seconds = max(seconds, _asked_to_wait(error))
        logger.warning("%s: %s; retry %d of %d in %.1f s", what, _explain(error), attempt, most, seconds)
        self.stop.wait(seconds)


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else 'no message'}"


def _offline_advice() -> str:
    offline = "HF_HUB_OFFLINE is set, so only what HF_HOME has cached can be read. " if _is_offline() else ""
    return (
        f"{offline}Without the network, download the files (`hf download allenai/c4 --repo-type dataset --include 'en/*'`) on a machine "
        "that has one and train with data=local_c4 data.train_files=[...], or tokenise them once and use data=tokenized"
    )


def _is_offline() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def is_passing(error: BaseException | None) -> bool:
    """Whether trying again can help: a network failure here or anywhere in the chain of causes, but not an answer like "not found"."""
    for cause in _causes(error):
        status = _status(cause)
        if status is not None:
            return is_passing_status(status)
        if isinstance(cause, (FileNotFoundError, PermissionError)):
            return False
        # A connection that broke off may leave half of a compressed block; the packages' exceptions are not all OSErrors.
        if isinstance(cause, (OSError, EOFError, zlib.error)) or is_of_network_package(cause):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it followed from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception is about."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _asked_to_wait(error: BaseException) -> float:
    """Seconds for which the hub asks to be left alone."""
    for cause in _causes(error):
        if isinstance(cause, HubBusy):
            return cause.wait_seconds
        if (status := _status(cause)) is not None and hasattr(cause, "response"):
            return seconds_asked(status, getattr(cause.response, "headers", {}))
    return 0.0


def open_hub_dataset(repository: str, subset: str, revision: str, split: str) -> IterableDataset:
    """The dataset, streamed. Raises what `datasets` raises."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("data=c4 needs the package datasets: install it, or use data=local_c4") from error
    prepare_libraries()
    return datasets.load_dataset(repository, subset or None, revision=revision, split=split, streaming=True)


class _HubReader(DocumentReader):
    """One pass over a stream's shards.

    State: {"shard": shards finished, "row": rows read of the current one, "dataset": a position in it of `datasets`' own, "since":
    rows read after that}.
    """

    def __init__(self, shards: list[int], open_shard: OpenShard, name: str, state: JSON, retries: Retries, tally: StreamTally) -> None:
        self._shards = shards
        self._open_shard = open_shard
        self._name = name
        state = state or {"shard": 0, "row": 0, "dataset": None, "since": 0}
        self._shard, self._row, self._position, self._since = (state[key] for key in ("shard", "row", "dataset", "since"))
        self._retries = retries
        self._tally = tally

    def state(self) -> JSON:
        return {"shard": self._shard, "row": self._row, "dataset": self._position, "since": self._since}

    def _read(self) -> Iterator[Document]:
        while self._shard < len(self._shards):
            file = f"{self._name}, shard {self._shards[self._shard]}"
            for row in self._rows_with_retries(file):
                self._row += 1
                text = row.get("text")
                if problem := check_text(text):
                    self._tally.skip_bad(file, self._row, problem)
                elif not text or text.isspace():
                    self._tally.skip_empty()
                else:
                    yield Document(text, file, self._row)
            self._shard, self._row, self._position, self._since = self._shard + 1, 0, None, 0

    def _rows_with_retries(self, file: str) -> Iterator[dict[str, Any]]:
        """Every row of the shard once and in order; after a failure it is opened again where the last row was read."""
        attempt = 0
        while True:
            try:
                for row in self._rows_from_position():
                    attempt = 0
                    yield row
                return
            except Exception as error:
                place = f"{file}, after document {self._row}"
                if isinstance(error, DataError):
                    raise
                if not is_passing(error):
                    raise DataError(f"{place}: {_explain(error)}. {_offline_advice()}") from error
                attempt += 1
                self._retries.wait(attempt, self._retries.most, error, place)

    def _rows_from_position(self) -> Iterator[dict[str, Any]]:
        dataset = self._open_shard(self._shards[self._shard])
        if self._position is not None:
            dataset.load_state_dict(self._position)
        for row in itertools.islice(dataset, self._since, None):
            self._since += 1
            if self._since == _ROWS_PER_POSITION:
                self._position, self._since = dataset.state_dict(), 0
            yield row


class HubSource:
    """A dataset of the hub, its shards (files) shared out among the streams."""

    def __init__(self, open_split: Callable[[str], IterableDataset], splits: dict[Split, str], *, name: str, retries: Retries) -> None:
        """`open_split(split name)` opens the dataset; `name` says what it is: repository, subset and revision."""
        self._open_split = open_split
        self._splits = splits
        self._name = name
        self._retries = retries
        self._opened: dict[str, IterableDataset] = {}

    def num_shards(self, split: Split) -> int:
        return self._dataset(split).num_shards

    def fingerprint(self, split: Split) -> str:
        return f"{self._name} {self._splits[split]}, {self.num_shards(split)} shards"

    def open(self, share: Share, state: JSON, tally: StreamTally) -> _HubReader:
        dataset = self._dataset(share.split)
        shards = list(range(dataset.num_shards))[share.stream :: share.num_streams]
        if share.seed is not None:
            # Not the shuffle of `datasets`: its buffer cannot be resumed exactly (huggingface/datasets#7901), and its state is large.
            shards = [shards[i] for i in permutation(len(shards), share.seed)]

        def open_shard(index: int) -> IterableDataset:
            return dataset.shard(num_shards=dataset.num_shards, index=index)

        return _HubReader(shards, open_shard, f"{self._name} {self._splits[share.split]}", state, self._retries, tally)

    def _dataset(self, split: Split) -> IterableDataset:
        """The opened dataset; asking the hub for its list of files is retried too."""
        name = self._splits[split]
        attempt = 0
        while name not in self._opened:
            try:
                self._opened[name] = self._open_split(name)
            except Exception as error:
                if isinstance(error, DataError):
                    raise
                if _is_offline() or not is_passing(error):
                    raise DataError(f"{self._name} cannot be opened: {_explain(error)}. {_offline_advice()}") from error
                attempt += 1
                is_there = any(_status(cause) is not None for cause in _causes(error))
                most = self._retries.most if is_there else min(_RETRIES_OF_REACHING, self._retries.most)
                self._retries.wait(attempt, most, error, f"opening {self._name}")
        return self._opened[name]
