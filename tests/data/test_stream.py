"""Logical streams side by side: none waits for another one's first window."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.schema import LocalC4DataConfig
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
