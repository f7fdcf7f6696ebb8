"""Files of JSON lines, sound and broken in every way that is known."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.config.schema import LocalC4DataConfig
from ngpt.data import json_lines
from ngpt.data.documents import DataError, Share, SkippedDocuments
from ngpt.data.json_lines import JsonLinesSource, expand_globs

GOOD = [f"document number {i}" for i in range(5)]


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(*files: Path, limit: int = 100) -> tuple[list[str], SkippedDocuments]:
    """Texts of all documents, and the account of those skipped."""
    skipped = SkippedDocuments(limit)
    reader = JsonLinesSource([str(file) for file in files], [], None).open(Share("train"), None, skipped.tally())
    return [document.text for document in reader], skipped


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"])
def test_every_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    data = lines_of(GOOD)
    if suffix.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        data = zstandard.compress(data[:50]) + zstandard.compress(data[50:])
    elif suffix.endswith(".gz"):
        data = gzip.compress(data)
    path.write_bytes(data)
    assert read(path)[0] == GOOD


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "invalid JSON"),
        (b"not json at all", "invalid JSON"),
        (b'["a", "list"]', "a JSON list, not an object"),
        (b'{"url": "no text here"}', "no field `text`"),
        (b'{"text": null}', "no field `text`"),
        (b'{"text": 17}', "`text` is int, not a string"),
        (b'{"text": ["a"]}', "`text` is list, not a string"),
        (b'{"text": "bad \xff byte"}', "invalid UTF-8 at byte 14"),
        (b'{"text": "lone \\ud800 surrogate"}', "lone surrogate"),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
def test_a_bad_line_is_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, reason: str) -> None:
    """Lines that are no JSON, no object, without text, with text of another type, not UTF-8 | skipped, counted, named with file and line"""
    path = tmp_path / "text.jsonl"
    path.write_bytes(lines_of(GOOD[:2]) + line + b"\n" + lines_of(GOOD[2:]))
    with caplog.at_level(logging.WARNING):
        texts, skipped = read(path)
    assert texts == GOOD
    assert skipped.totals == {"bad_documents": 1, "empty_documents": 0}
    assert f"{path}:3: " in caplog.text
    assert reason in caplog.text


def test_empty_documents_are_skipped_and_do_not_count_as_bad(tmp_path: Path) -> None:
    """Empty documents | skipped, and counted apart"""
    path = tmp_path / "text.jsonl"
    path.write_bytes(lines_of(["", "  \n ", *GOOD]) + b"\n   \n")
    texts, skipped = read(path, limit=0)
    assert texts == GOOD
    assert skipped.totals == {"bad_documents": 0, "empty_documents": 2}


def test_odd_but_legal_text_is_kept(tmp_path: Path) -> None:
    """NUL characters, odd white space, other scripts | kept as they are"""
    path = tmp_path / "text.jsonl"
    texts = ["nul \0 byte", "x" * 3_000_000, "a", "\N{GRINNING FACE} line\nbreak"]
    path.write_bytes(lines_of(texts).rstrip(b"\n"))
    assert read(path)[0] == texts


def test_a_truncated_gzip_loses_its_remainder_and_the_next_file_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A truncated gzip file | what can be read is read; one bad document; the next file follows"""
    broken, sound = tmp_path / "a.json.gz", tmp_path / "b.json.gz"
    texts = [os.urandom(40).hex() for _ in range(2000)]
    broken.write_bytes(gzip.compress(lines_of(texts))[:-30_000])
    sound.write_bytes(gzip.compress(lines_of(GOOD)))
    with caplog.at_level(logging.WARNING):
        read_texts, skipped = read(broken, sound)
    kept = len(read_texts) - len(GOOD)
    assert 0 < kept < 2000
    assert read_texts == texts[:kept] + GOOD
    assert skipped.totals["bad_documents"] == 1
    assert f"{broken}:{kept + 1}: corrupt file, its remainder is lost" in caplog.text


@pytest.mark.parametrize("position", [5, 3000, -6])
def test_a_corrupt_gzip_is_one_bad_document(tmp_path: Path, position: int) -> None:
    """A flipped byte in a gzip file | one bad document, and no wrong text"""
    broken, sound = tmp_path / "a.json.gz", tmp_path / "b.json.gz"
    texts = [os.urandom(40).hex() for _ in range(500)]
    data = bytearray(gzip.compress(lines_of(texts)))
    data[position] ^= 0xFF
    if position == 5:
        data[0] ^= 0xFF  # no gzip at all
    broken.write_bytes(data)
    sound.write_bytes(gzip.compress(lines_of(GOOD)))
    read_texts, skipped = read(broken, sound)
    assert read_texts[-5:] == GOOD
    assert 1 <= skipped.totals["bad_documents"] <= 3  # decompression may give some nonsense before it notices


def test_a_truncated_zstd_is_noticed(tmp_path: Path) -> None:
    """A truncated zstd file | noticed, one bad document"""
    zstandard = pytest.importorskip("zstandard")
    broken = tmp_path / "a.json.zst"
    broken.write_bytes(zstandard.compress(lines_of([os.urandom(40).hex() for _ in range(5000)]))[:-2000])
    _, skipped = read(broken)
    assert skipped.totals["bad_documents"] == 1


@pytest.mark.parametrize("contents", [b"", gzip.compress(b"")], ids=["plain", "gzip"])
def test_an_empty_file_has_no_documents(tmp_path: Path, contents: bytes) -> None:
    """An empty file | no documents, no error"""
    empty, sound = tmp_path / "a.json.gz", tmp_path / "b.json.gz"
    empty.write_bytes(contents)
    sound.write_bytes(gzip.compress(lines_of(GOOD)))
    assert read(empty, sound, limit=0)[0] == GOOD


def test_an_absurdly_long_line_is_never_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line longer than the limit | one bad document, never held in memory"""
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "text.jsonl"
    path.write_bytes(lines_of(GOOD[:2]) + lines_of(["x" * 5_000_000]) + lines_of(GOOD[2:]) + lines_of(["y" * 2000])[:-1])
    texts, skipped = read(path)
    assert texts == GOOD
    assert skipped.totals["bad_documents"] == 2


def test_too_many_bad_documents_stop_the_reading(tmp_path: Path) -> None:
    """More bad documents than data.max_bad_documents | a clear error"""
    path = tmp_path / "text.jsonl"
    path.write_bytes(b"broken\n" * 4 + lines_of(GOOD))
    assert read(path, limit=4)[0] == GOOD
    with pytest.raises(DataError, match=r"4 bad documents, more than data.max_bad_documents=3; the last one is .*text.jsonl:4"):
        read(path, limit=3)


def test_a_run_of_many_epochs_is_not_stopped_by_the_same_few_bad_documents(tmp_path: Path, open_loader: Callable) -> None:
    (tmp_path / "text.jsonl").write_bytes(lines_of(GOOD[:3]) + b"broken\n" + lines_of([*GOOD[3:], ""]))
    data = LocalC4DataConfig(train_files=[str(tmp_path / "*.jsonl")], max_bad_documents=1, packing="pad")
    loader = open_loader(data)
    epochs = {row["epoch"] for _ in range(16) for row in next(loader).identity()["rows"]}
    assert len(epochs) >= 3
    assert loader.stats()["bad_documents"] >= 3
    assert loader.stats()["empty_documents"] >= 3


def test_a_resumed_run_does_not_count_a_bad_document_twice(tmp_path: Path, open_loader: Callable) -> None:
    (tmp_path / "text.jsonl").write_bytes(b"broken\n" + lines_of(GOOD * 20))
    data = LocalC4DataConfig(train_files=[str(tmp_path / "*.jsonl")], max_bad_documents=1, packing="pad", shuffle_window=4)
    loader = open_loader(data)
    for _ in range(8):
        next(loader)
    resumed = open_loader(data)
    resumed.load_state_dict(loader.state_dict())
    for _ in range(8):
        next(resumed)
    assert resumed.state_dict()["streams"]["0"]["skipped"] == {"bad": 1, "empty": 0}


def test_an_error_of_the_reading_thread_reaches_the_loop_every_time(tmp_path: Path, open_loader: Callable) -> None:
    """The thread that reads data fails | its error is raised by every further `next`, never a wait for ever"""
    (tmp_path / "text.jsonl").write_bytes(b"broken\n" * 3)
    loader = open_loader(LocalC4DataConfig(train_files=[str(tmp_path / "*.jsonl")], max_bad_documents=2))
    for _ in range(2):
        with pytest.raises(DataError, match="3 bad documents"):
            next(loader)


def test_files_without_any_document_are_an_error_not_an_endless_loop(tmp_path: Path, open_loader: Callable) -> None:
    """Files without a single document | an error, not an endless loop"""
    (tmp_path / "text.jsonl").write_bytes(lines_of(["", ""]))
    with pytest.raises(DataError, match="no usable document"):
        next(open_loader(LocalC4DataConfig(train_files=[str(tmp_path / "*.jsonl")])))


def test_an_empty_glob_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    """A glob that matches nothing; a file of an unknown kind | refused by name"""
    with pytest.raises(DataError, match=r"data.train_files: no file matches .*nothing\*"):
        expand_globs([str(tmp_path / "nothing*")], option="data.train_files")
    (tmp_path / "text.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"text.csv ends in none of .json, .jsonl"):
        expand_globs([str(tmp_path / "*")], option="data.train_files")


def test_globs_are_sorted_and_each_file_counts_once(tmp_path: Path) -> None:
    for name in ("b.json", "a.json"):
        (tmp_path / name).write_text("")
    found = expand_globs([str(tmp_path / "*.json"), str(tmp_path / "a.json")], option="x")
    assert [Path(file).name for file in found] == ["a.json", "b.json"]


def test_train_files_are_required(open_loader: Callable) -> None:
    with pytest.raises(DataError, match=r"needs data\.train_files"):
        open_loader(LocalC4DataConfig())
