"""The reader of text files, given anything: documents as they were written, or an account of what is wrong."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpt.data.documents import DataError, Document, Share, SkippedDocuments
from ngpt.data.json_lines import SUFFIXES, JsonLinesSource, parse_line

FACTOR = int(os.environ.get("NGPT_FUZZ", "1"))
TEXTS = [f"document {i}: " + "words and more words " * (i % 7) for i in range(200)]
PACKED = {".json": lambda data: data, ".json.gz": gzip.compress, ".json.zst": zstandard.compress}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "url", ""]) | st.text(), inner, max_size=3),
    max_leaves=8,
)

PIECES = st.sampled_from([b"{", b'"text"', b":", b'"a"', b"\n", b"\r", b"\0", b"\xff", b"\\ud800", b"}"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(path: Path, *, limit: int = 10**9, state: object = None) -> tuple[list[Document], dict[str, int], list[object]]:
    """Documents, what was skipped, and the reader's state before each document."""
    skipped = SkippedDocuments(limit)
    reader = JsonLinesSource([str(path)], [], None).open(Share("train"), state, skipped.tally())
    documents, states = [], [reader.state()]
    for document in reader:
        documents.append(document)
        states.append(reader.state())
    return documents, skipped.totals, states


@settings(max_examples=60 * FACTOR, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), max_size=8),
    suffix=st.sampled_from(sorted(PACKED)),
    cuts=st.lists(st.integers(0, 500), max_size=3),
)
def test_any_text_is_read_as_it_was_written_however_it_is_packed(folder: Path, texts: list[str], suffix: str, cuts: list[int]) -> None:
    """Any text (hypothesis), plain, gzip, zstd, cut anywhere into members | read as it was written"""
    data, pack = lines_of(texts), PACKED[suffix]
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    (folder / f"any{suffix}").write_bytes(b"".join(pack(data[a:b]) for a, b in itertools.pairwise(edges)))
    documents, skipped, _ = read(folder / f"any{suffix}")
    assert [document.text for document in documents] == [text for text in texts if text and not text.isspace()]
    assert skipped["bad_documents"] == 0


@settings(max_examples=200 * FACTOR)
@given(record=ANY_JSON)
def test_any_json_on_a_line_is_a_text_or_is_told_what_is_wrong_with_it(record: object) -> None:
    """Any JSON value on a line | a text, or what is wrong with it"""
    text, problem = parse_line(json.dumps(record).encode())
    wanted = record.get("text") if isinstance(record, dict) else None
    if problem is None:
        assert text == wanted
        text.encode()
    else:
        assert text == ""
        assert not isinstance(wanted, str) or "surrogate" in problem


@settings(max_examples=150 * FACTOR, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300) | st.lists(PIECES).map(b"".join),
    suffix=st.sampled_from(SUFFIXES),
    packed=st.booleans(),
)
def test_any_bytes_are_documents_or_counted_and_a_resume_sees_the_same(folder: Path, data: bytes, suffix: str, packed: bool) -> None:
    """Any bytes as a file | documents or bad documents; a resume sees the same"""
    path = folder / f"bytes{suffix}"
    path.write_bytes(PACKED[".json" + suffix.removeprefix(".jsonl").removeprefix(".json")](data) if packed else data)
    documents, skipped, states = read(path)
    for document in documents:
        document.text.encode()
    assert len(documents) + sum(skipped.values()) <= data.count(b"\n") + 1 or not packed
    for position in {0, len(documents) // 2, len(documents)}:
        assert read(path, state=states[position])[0] == documents[position:]


@pytest.mark.parametrize("suffix", sorted(PACKED))
def test_a_damaged_file_gives_documents_or_an_account_of_them_and_never_anything_else(
    folder: Path, damaged: Callable[..., Iterator[bytes]], suffix: str
) -> None:
    """Seeded damage to files of each kind | documents or an account of them, never anything else"""
    whole = PACKED[suffix](lines_of(TEXTS))
    for data in damaged(whole, 120):
        (folder / f"damaged{suffix}").write_bytes(data)
        documents, skipped, _ = read(folder / f"damaged{suffix}")
        assert skipped["bad_documents"] > 0 or documents
        for document in documents:
            document.text.encode()


@pytest.mark.parametrize("suffix", [".json.gz", ".json.zst"])
def test_a_compressed_file_cut_anywhere_gives_the_beginning_of_its_documents_and_says_so(folder: Path, suffix: str) -> None:
    """A compressed file cut at every byte | the beginning of its documents, and said so"""
    whole = PACKED[suffix](lines_of(TEXTS))
    for length in range(1, len(whole), max(1, len(whole) // (80 * FACTOR))):
        (folder / f"cut{suffix}").write_bytes(whole[:length])
        documents, skipped, _ = read(folder / f"cut{suffix}")
        assert [document.text for document in documents] == TEXTS[: len(documents)]
        assert skipped["bad_documents"] >= 1


def test_a_flipped_byte_in_a_plain_file_costs_no_other_line(folder: Path) -> None:
    """Each byte of a plain file flipped | no other line is lost"""
    whole = lines_of(TEXTS)
    for position in range(0, len(whole), max(1, len(whole) // (150 * FACTOR))):
        data = bytearray(whole)
        data[position] ^= 0x80  # no ASCII any more, and no line break
        (folder / "flipped.json").write_bytes(data)
        documents, skipped, _ = read(folder / "flipped.json")
        hit = whole[:position].count(b"\n")
        lost = {hit, hit + 1} if whole[position : position + 1] == b"\n" else {hit}
        assert {document.text for document in documents} >= {text for i, text in enumerate(TEXTS) if i not in lost}
        assert skipped["bad_documents"] == 1


def test_the_limit_on_bad_documents_stops_any_rubbish(folder: Path) -> None:
    """A file of rubbish | stopped by the limit"""
    (folder / "rubbish.json").write_bytes(b"rubbish\n" * 1000)
    with pytest.raises(DataError, match=r"4 bad documents, more than data\.max_bad_documents=3"):
        read(folder / "rubbish.json", limit=3)


# ------------------------------------------------------------------------------------------------------- bounded memory
READ_ALL = """
import sys
from ngpt.data.documents import Share, SkippedDocuments
from ngpt.data.json_lines import JsonLinesSource
skipped = SkippedDocuments(10)
documents = list(JsonLinesSource([sys.argv[1]], [], None).open(Share("train"), None, skipped.tally()))
assert [document.text for document in documents] == ["before", "after"], len(documents)
assert skipped.totals == {"bad_documents": 1, "empty_documents": 0}, skipped.totals
"""


def test_a_line_of_two_gigabytes_in_a_gzip_bomb_is_one_bad_document_in_little_memory(
    tmp_path: Path, memory_of: Callable[[str, Path], int]
) -> None:
    """A line of 2 GB in a gzip bomb | one bad document, in little memory"""
    piece = gzip.compress(b"x" * 2**26)
    bomb = gzip.compress(lines_of(["before"]) + b'{"text": "') + 32 * piece + gzip.compress(b'"}\n' + lines_of(["after"]))
    (tmp_path / "bomb.json.gz").write_bytes(bomb)
    assert len(bomb) < 3 * 2**20
    assert memory_of(READ_ALL, tmp_path / "bomb.json.gz") < 350


def test_a_zstd_bomb_is_one_bad_document_in_little_memory(tmp_path: Path, memory_of: Callable[[str, Path], int]) -> None:
    """A zstd bomb | one bad document, in little memory"""
    frame = zstandard.ZstdCompressor().compressobj()
    pieces = [b'{"text": "', *[b"x" * 2**24] * 32, b'"}\n']
    line = b"".join(map(frame.compress, pieces)) + frame.flush()
    bomb = zstandard.compress(lines_of(["before"])) + line + zstandard.compress(lines_of(["after"]))
    (tmp_path / "bomb.json.zst").write_bytes(bomb)
    assert len(bomb) < 2**16, "all of it fits in one read"
    assert memory_of(READ_ALL, tmp_path / "bomb.json.zst") < 350


def test_a_zstd_frame_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    """A zstd frame that asks for a window of gigabytes | refused"""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=29)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "wide.json.zst").write_bytes(compressor.compress(lines_of(TEXTS)) + compressor.flush())
    documents, skipped, _ = read(tmp_path / "wide.json.zst")
    assert (documents, skipped["bad_documents"]) == ([], 1)


def test_many_tiny_gzip_members_are_read_in_time(tmp_path: Path) -> None:
    """A file of very many empty gzip members | read in time"""
    empty = zlib.compressobj(9, zlib.DEFLATED, 31).flush()
    (tmp_path / "many.json.gz").write_bytes(empty * 50_000 + gzip.compress(lines_of(TEXTS)))
    assert len(read(tmp_path / "many.json.gz")[0]) == len(TEXTS)
