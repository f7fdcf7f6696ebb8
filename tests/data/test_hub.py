"""The hub's stream with failures: nothing lost, nothing repeated, clear ends. Local files stand in for the hub."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.schema import C4DataConfig
from ngpt.data import sources
from ngpt.data.documents import DataError, Share, SkippedDocuments
from ngpt.data.hub import HubSource, Retries, is_passing

datasets = pytest.importorskip("datasets")


class Flaky:
    """A dataset that raises `error` after every `every` rows read in the whole test, and otherwise does what `inner` does."""

    def __init__(self, inner: Any, every: int, error: Exception, counter: list[int]) -> None:
        self.inner, self.every, self.error, self.counter = inner, every, error, counter

    @property
    def num_shards(self) -> int:
        return self.inner.num_shards

    def shard(self, **which: int) -> Flaky:
        return Flaky(self.inner.shard(**which), self.every, self.error, self.counter)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for row in self.inner:
            self.counter[0] += 1
            if self.counter[0] % self.every == 0:
                raise self.error
            yield row


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Three shards of 700, 300 and 10 documents."""
    files = []
    for shard, count in enumerate([700, 300, 10]):
        files.append(str(tmp_path / f"shard-{shard}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps({"text": f"shard {shard} row {row}"}) + "\n" for row in range(count)))
    return files


@pytest.fixture
def dataset(shards: list[str], tmp_path: Path) -> Any:
    return datasets.load_dataset("json", data_files=shards, split="train", streaming=True, cache_dir=str(tmp_path / "cache"))


def source_of(dataset: Any, retries: Retries | None = None) -> HubSource:
    return HubSource(lambda _: dataset, {"train": "train", "eval": "validation"}, name="some/set", retries=retries or Retries(3, 0.0))


def texts(source: HubSource, share: Share | None = None, state: Any = None, count: int | None = None) -> tuple[list[str], Any]:
    reader = source.open(share or Share("train"), state, SkippedDocuments(0).tally())
    found = []
    for document in reader:
        found.append(document.text)
        if len(found) == count:
            break
    return found, reader.state()


EXPECTED = [f"shard {shard} row {row}" for shard, count in enumerate([700, 300, 10]) for row in range(count)]


def test_a_stream_is_read_in_order_and_named(dataset: Any) -> None:
    assert texts(source_of(dataset))[0] == EXPECTED
    document = next(source_of(dataset).open(Share("train"), None, SkippedDocuments(0).tally()))
    assert (document.file, document.line) == ("some/set train, shard 0", 1)


@pytest.mark.parametrize("every", [257, 300, 401, 699])
def test_failures_in_mid_stream_lose_and_repeat_nothing(dataset: Any, every: int) -> None:
    # Every reopening reads up to 255 rows again, so the failures must be rarer than that.
    retries = Retries(3, 0.0)
    flaky = Flaky(dataset, every, ConnectionError("connection reset by peer"), [0])
    assert texts(source_of(flaky, retries))[0] == EXPECTED
    assert retries.count >= 1


def test_a_stream_that_gets_nowhere_is_given_up(dataset: Any) -> None:
    flaky = Flaky(dataset, 7, ConnectionError("connection reset by peer"), [0])
    with pytest.raises(DataError, match=r"some/set train, shard 0, after document 6.*connection reset by peer \(retried 3 times\)"):
        texts(source_of(flaky, Retries(3, 0.0)))


@pytest.mark.parametrize("interrupted_after", [0, 1, 100, 255, 256, 257, 512, 699, 700, 701, 1009])
def test_a_state_continues_exactly(dataset: Any, interrupted_after: int) -> None:
    share = Share("train", seed=5)
    whole = texts(source_of(dataset), share)[0]
    assert sorted(whole) == sorted(EXPECTED)
    state = texts(source_of(dataset), share, count=interrupted_after)[1] if interrupted_after else None
    state = json.loads(json.dumps(state))
    assert len(json.dumps(state)) < 500
    assert texts(source_of(dataset), share, state)[0] == whole[interrupted_after:]


def test_streams_share_out_the_shards(dataset: Any) -> None:
    parts = [texts(source_of(dataset), Share("train", stream, 2))[0] for stream in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(EXPECTED)
    assert {text.split()[1] for text in parts[0]} == {"0", "2"}


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["a", "", None, "b"]))
    dataset = datasets.load_dataset("json", data_files=[str(file)], split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    skipped = SkippedDocuments(1)
    reader = source_of(dataset).open(Share("train"), None, skipped.tally())
    assert [document.text for document in reader] == ["a", "b"]
    assert skipped.totals == {"bad_documents": 1, "empty_documents": 1}


def test_a_broken_file_is_an_error_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": broken\n')
    dataset = datasets.load_dataset("json", data_files=[str(file)], split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    retries = Retries(3, 0.0)
    with pytest.raises(DataError, match="some/set train, shard 0, after document"):
        texts(source_of(dataset, retries))
    assert retries.count == 0


def test_waits_double_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = Retries(10, 1.0)
    waits: list[float] = []
    monkeypatch.setattr(retries.stop, "wait", waits.append)
    for attempt in range(1, 9):
        retries.wait(attempt, 10, ConnectionError("no route"), "reading")
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True))
    assert retries.count == 8


def test_only_passing_failures_are_retried() -> None:
    class Answer(Exception):
        def __init__(self, status_code: int) -> None:
            self.response = type("Response", (), {"status_code": status_code})()

    assert is_passing(ConnectionError())
    assert is_passing(TimeoutError())
    assert is_passing(Answer(503))
    assert is_passing(Answer(429))
    assert is_passing(zlib.error())
    assert not is_passing(Answer(404))
    assert not is_passing(FileNotFoundError())
    assert not is_passing(ValueError())
    wrapped = ValueError("while reading")
    wrapped.__cause__ = ConnectionResetError()
    assert is_passing(wrapped)


def test_offline_is_a_clear_error(open_loader: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> Any:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(sources, "open_hub_dataset", unreachable)
    data = C4DataConfig(retry_seconds=0.0)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(DataError, match=r"opening allenai/c4/en@1588ec45.*Couldn't reach.*retried 3 times.*data=local_c4"):
        open_loader(data)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"cannot be opened.*HF_HUB_OFFLINE is set.*HF_HOME"):
        open_loader(data)


def test_closing_does_not_wait_for_a_retry(dataset: Any, open_loader: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "open_hub_dataset", lambda *_: Flaky(dataset, 2, ConnectionError("down"), [0]))
    loader = open_loader(C4DataConfig(retry_seconds=50.0, max_retries=5))
    waiter = threading.Thread(target=next, args=(loader,), daemon=True)
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive(), "the reader waits before its first retry"
    closer = threading.Thread(target=loader.close)
    closer.start()
    closer.join(10)
    assert not closer.is_alive()
