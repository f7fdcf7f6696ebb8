"""Local text in C4's layout: files of one JSON object a line, plain, gzip or zstd."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from isal import isal_zlib  # gzip at 2.5 times zlib's speed

from ngpt.data.documents import JSON, DataError, Document, DocumentReader, Share, Split, StreamTally, check_text
from ngpt.data.seeding import permutation

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
MAX_LINE_BYTES = 16 * 2**20  # SentencePiece needs about 50 times that for a document
_BUFFER_BYTES = 2**20
# Compressed bytes taken at a time. What they become is in memory at once, at most 64 MiB of it: a thousand times as much with gzip, 32,768
# times with zstd. Where they are damaged, all of them are lost.
_GZIP_BYTES = 2**16
_ZSTD_BYTES = 2**11
_ZSTD_WINDOW_BYTES = 2**27  # that a frame may ask for; zstd's own limit, too, where it is not told `--long=31`


class _Decompressed(io.RawIOBase):
    """The contents of a file of any number of gzip members or zstd frames. EOFError if the last one is cut.

    Unlike gzip.open and zstandard's reader, it gives out all that comes before the damage, and never ends silently within a frame.
    """

    def __init__(self, path: str, new_frame: Callable[[], Any], read_bytes: int) -> None:
        self._new_frame = new_frame
        self._read_bytes = read_bytes
        self._file = open(path, "rb")  # noqa: SIM115 (closed in close)
        self._frame: Any = None
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._text:
            # Zero bytes may follow a gzip member as padding; no frame begins with one.
            self._compressed = self._compressed if self._frame else self._compressed.lstrip(b"\0")
            if not self._compressed:
                self._compressed = self._file.read(self._read_bytes)
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("it ends in the middle of the compressed data")
                    return 0
                continue
            self._frame = self._frame or self._new_frame()
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: str) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    """The decompressed bytes of a file, and the exceptions that mean its contents are corrupt."""
    if path.endswith(".gz"):
        raw = _Decompressed(path, lambda: isal_zlib.decompressobj(wbits=31), _GZIP_BYTES)
        return io.BufferedReader(raw, _BUFFER_BYTES), (EOFError, isal_zlib.error)
    if path.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: reading zstd needs the package zstandard (or recompress the file with gzip)") from None
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        raw = _Decompressed(path, decompressor.decompressobj, _ZSTD_BYTES)
        return io.BufferedReader(raw, _BUFFER_BYTES), (EOFError, zstandard.ZstdError)
    return open(path, "rb", buffering=_BUFFER_BYTES), ()


def expand_globs(patterns: list[str], *, option: str, suffixes: tuple[str, ...] | None = SUFFIXES) -> list[str]:
    """The files that match, sorted, each once. Raises DataError if a pattern matches nothing or a file is of no known kind."""
    files: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        if not matches:
            raise DataError(f"{option}: no file matches {pattern!r}; check the path (relative to {os.getcwd()}) and quote the glob")
        files.update(matches)
    unknown = [file for file in sorted(files) if suffixes and not file.endswith(suffixes)]
    if unknown:
        raise DataError(f"{option}: {unknown[0]} ends in none of {', '.join(suffixes or ())}")
    return sorted(files)


def read_line(lines: IO[bytes]) -> bytes | None:
    """The next line, b"" at the end of the file, or None for a line of more than MAX_LINE_BYTES, never held in memory as a whole."""
    line = lines.readline(MAX_LINE_BYTES)
    if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
        return line
    while line and not line.endswith(b"\n"):
        line = lines.readline(_BUFFER_BYTES)
    return None


def parse_line(line: bytes) -> tuple[str, str | None]:
    """(text, None), or ("", what is wrong with the line)."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return "", f"invalid UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return "", f"invalid JSON ({error})"
    if not isinstance(record, dict):
        return "", f"a JSON {type(record).__name__}, not an object"
    text = record.get("text")
    problem = check_text(text)
    return (text, None) if isinstance(text, str) and problem is None else ("", problem)


class JsonLinesReader(DocumentReader):
    """The documents of one share, file after file. State: {"shard": files finished, "line": lines read of the current one}."""

    def __init__(self, files: list[str], state: JSON, keep: tuple[int, bool] | None, tally: StreamTally) -> None:
        self._files = files
        self._shard, self._line = (state["shard"], state["line"]) if state else (0, 0)
        self._keep = keep
        self._tally = tally

    def state(self) -> JSON:
        return {"shard": self._shard, "line": self._line}

    def _read(self) -> Iterator[Document]:
        while self._shard < len(self._files):
            yield from self._read_file(self._files[self._shard])
            self._shard, self._line = self._shard + 1, 0

    def _read_file(self, path: str) -> Iterator[Document]:
        try:
            lines, corrupt = _open(path)
            with lines:
                try:
                    for _ in range(self._line):
                        read_line(lines)
                    while (line := read_line(lines)) != b"":
                        self._line += 1
                        document = self._document(line, path)
                        if document is not None:
                            yield document
                except corrupt as error:
                    self._tally.skip_bad(path, self._line + 1, f"corrupt file, its remainder is lost ({error})")
        except OSError as error:
            raise DataError(f"{path}: cannot be read, after line {self._line} ({error.strerror or error})") from error

    def _document(self, line: bytes | None, path: str) -> Document | None:
        """The document of a line, or None if it belongs to the other split or had to be skipped."""
        if self._keep is not None:
            every, held_out = self._keep
            if (self._line % every == 0) != held_out:
                return None
        if line is None:
            self._tally.skip_bad(path, self._line, f"a line of more than {MAX_LINE_BYTES} bytes")
            return None
        if line.isspace():
            return None
        text, problem = parse_line(line)
        if problem:
            self._tally.skip_bad(path, self._line, problem)
        elif not text or text.isspace():
            self._tally.skip_empty()
        else:
            return Document(text, path, self._line)
        return None


class JsonLinesSource:
    """Files of JSON lines. Without files for evaluation, every `holdout_every`-th line of each file is held out."""

    def __init__(self, train_files: list[str], eval_files: list[str], holdout_every: int | None) -> None:
        self._files = {"train": train_files, "eval": eval_files or train_files}
        self._holdout_every = None if eval_files else holdout_every

    def num_shards(self, split: Split) -> int:
        return len(self._files[split])

    def fingerprint(self, split: Split) -> str:
        """Of names and sizes: contents are too large to read, and a corpus may move to another folder."""
        sizes = [(Path(file).name, os.path.getsize(file)) for file in self._files[split]]
        digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
        held_out = f", 1 line in {self._holdout_every} held out" if self._holdout_every else ""
        return f"{len(sizes)} files of {sum(size for _, size in sizes)} bytes ({digest[:16]}){held_out}"

    def open(self, share: Share, state: JSON, tally: StreamTally) -> JsonLinesReader:
        files = self._files[share.split][share.stream :: share.num_streams]
        if share.seed is not None:
            files = [files[i] for i in permutation(len(files), share.seed)]
        keep = None if self._holdout_every is None else (self._holdout_every, share.split == "eval")
        return JsonLinesReader(files, state, keep, tally)
