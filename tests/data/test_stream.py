"""Logical streams side by side: none waits for another one's first window."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.schema import LocalC4DataConfig
from ngpt.data import stream
from ngpt.data.documents import Document
from ngpt.data.json_lines import JsonLinesReader

STREAMS = 4


@pytest.mark.parametrize("resumed", [False, True], ids=["from the beginning", "after a resume"])
def test_the_first_windows_of_all_streams_are_read_at_the_same_time(
    resumed: bool, corpus: Path, open_loader: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")], streams=STREAMS)
    loader, state = open_loader(data), None
    expected = [next(loader).input_ids.tolist() for _ in range(8)]
    if resumed:
        loader = open_loader(data)
        for _ in range(4):
            next(loader)
        state, expected = loader.state_dict(), expected[4:]
    loader.close()

    together, calls, original = threading.Barrier(STREAMS), itertools.count(), JsonLinesReader._read_file

    def meet_the_others(self: JsonLinesReader, path: str) -> Any:
        if next(calls) < STREAMS:
            together.wait(timeout=10)  # raises unless every stream comes here
        return original(self, path)

    monkeypatch.setattr(JsonLinesReader, "_read_file", meet_the_others)
    loader = open_loader(data)
    if state is not None:
        loader.load_state_dict(state)
    assert [next(loader).input_ids.tolist() for _ in expected] == expected


def test_long_documents_make_windows_and_blocks_shorter_and_a_resume_exact(
    corpus: Path, open_loader: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_WINDOW_CHARACTERS", 600)
    monkeypatch.setattr(stream, "_BLOCK_CHARACTERS", 200)
    data = LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")], streams=1)
    loader = open_loader(data)
    windows = set()
    for _ in range(12):
        for _ in range(4):  # a global batch
            next(loader)
        windows.add(loader.state_dict()["streams"]["0"]["window"])
    assert len(windows) >= 3, "a window of 2048 documents would hold all of them"
    resumed = open_loader(data)
    resumed.load_state_dict(loader.state_dict())
    assert [next(resumed).input_ids.tolist() for _ in range(8)] == [next(loader).input_ids.tolist() for _ in range(8)]


def test_documents_are_taken_up_to_a_number_and_to_their_characters_together() -> None:
    documents = [Document("x" * length, "file", 1) for length in (3, 4, 5, 100, 1)]
    assert stream.take_documents(iter(documents), 2, 50) == documents[:2]
    assert stream.take_documents(iter(documents), 5, 12) == documents[:3]
    assert stream.take_documents(iter(documents), 5, 13) == documents[:4]
    rest = iter(documents)
    stream.take_documents(rest, 5, 7)
    assert list(rest) == documents[2:]
