"""Folders of token shards, written by `python -m data_prep.tokenize`: their manifest, and reading them as one long array.

A folder holds shard files, each a flat little-endian array of token ids in which every document is closed by EOS, and manifest.json:
tokenizer (fingerprint, vocab_size, eos_id), dtype, totals, and of each shard its name, source, tokens, documents, bytes and sha256.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ngpt.data.documents import JSON, DataError, Document, DocumentReader, Share, Split, StreamTally
from ngpt.data.json_lines import expand_globs
from ngpt.data.seeding import permutation
from ngpt.dist.ranks import Ranks

MANIFEST = "manifest.json"
FORMAT = "ngpt-tokens-1"
_SCANNED_TOKENS = 2**20
_READ_TOKENS = 2**22
_VERIFYING_THREADS = 4


@dataclass(frozen=True)
class Shard:
    """One file of a folder, and the account of the text that it was made from."""

    file: str
    source: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    bad_documents: int = 0
    empty_documents: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 is {self.sha256!r}, not 64 hexadecimal digits")


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    tokenizer: str
    vocab_size: int
    eos_id: int
    dtype: str
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        """Raise ValueError, in words, where the fields make no sense together."""
        _check_types(self)
        if self.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype {self.dtype!r} is neither uint16 nor uint32")
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} is outside the vocabulary of {self.vocab_size}")
        twice = [name for name, count in Counter(shard.file for shard in self.shards).items() if count > 1]
        if twice:
            raise ValueError(f"the shard {twice[0]!r} is named twice, its tokens would be read twice")

    def totals(self) -> dict[str, int]:
        counted = ("tokens", "documents", "bad_documents", "empty_documents")
        return {name: sum(getattr(shard, name) for shard in self.shards) for name in counted}

    def dump(self) -> bytes:
        head = {"format": FORMAT, "tokenizer": self.tokenizer, "vocab_size": self.vocab_size, "eos_id": self.eos_id, "dtype": self.dtype}
        record = {**head, **self.totals(), "shards": [asdict(shard) for shard in self.shards]}
        return json.dumps(record, indent=1).encode() + b"\n"


def _check_types(record: Shard | Manifest) -> None:
    """Raise ValueError unless every text is a text and every count a count: what JSON brought is anybody's."""
    for field in fields(record):
        value = getattr(record, field.name)
        if field.type == "str" and not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r}, not a text")
        if field.type == "int" and (type(value) is not int or value < 0):
            raise ValueError(f"{field.name} is {value!r}, not a whole number of at least 0")


def smallest_dtype(vocab_size: int) -> str:
    """`uint16` where all ids fit, else `uint32`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def read_manifest(path: str | Path) -> tuple[Path, Manifest]:
    """(folder, manifest) of a folder or of its manifest.json. Raises DataError if it is missing, broken, or names files elsewhere."""
    path = Path(path)
    folder = path.parent if path.name == MANIFEST else path
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
        if record["format"] != FORMAT:
            raise DataError(f"{folder / MANIFEST}: format {record['format']!r}, not {FORMAT!r}; tokenise the text again")
        if not isinstance(record["shards"], list):
            raise ValueError("the shards are not a list")
        shards = tuple(Shard(**shard) for shard in record["shards"])
        manifest = Manifest(record["tokenizer"], record["vocab_size"], record["eos_id"], record["dtype"], shards)
        wrong = {name: record.get(name) for name, total in manifest.totals().items() if record.get(name) != total}
        if wrong:
            raise ValueError(f"it says {wrong} of all shards, which is not their sum")
    except OSError as error:
        raise DataError(f"{folder / MANIFEST}: {error.strerror}; give folders that `python -m data_prep.tokenize` has finished") from error
    except DataError:
        raise
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / MANIFEST}: not a manifest of token shards ({type(error).__name__}: {error})") from error
    for shard in manifest.shards:
        _check_name(folder, shard.file)
    return folder, manifest


def _check_name(folder: Path, name: str) -> None:
    """A manifest may be somebody else's: it can name files of its own folder only."""
    plain = name.isprintable() and name not in ("", ".", "..") and os.path.basename(name) == name and "\\" not in name
    if not plain or (folder / name).resolve().parent != folder.resolve():
        raise DataError(f"{folder / MANIFEST}: the shard {name!r} is not a file of this folder")


def shard_problem(folder: Path, manifest: Manifest, shard: Shard) -> str | None:
    """What is wrong with a shard at first sight (existence and size), or None."""
    width = np.dtype(manifest.dtype).itemsize
    try:
        size = os.path.getsize(folder / shard.file)
    except OSError as error:
        return f"{folder / shard.file}: {error.strerror}"
    if size != shard.bytes or size != shard.tokens * width:
        return f"{folder / shard.file}: {size} bytes, but the manifest says {shard.bytes} ({shard.tokens} tokens of {width} bytes)"
    return None


def content_problems(folder: Path, manifest: Manifest, shard: Shard) -> list[str]:
    """Everything that is wrong with a shard, all of which is read: size, checksum, ids outside the vocabulary, count of documents."""
    problem = shard_problem(folder, manifest, shard)
    if problem:
        return [problem]
    path = folder / shard.file
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    digest, documents, largest, last = hashlib.sha256(), 0, -1, manifest.eos_id
    with open(path, "rb") as file:
        while data := file.read(_READ_TOKENS * dtype.itemsize):
            tokens = np.frombuffer(data, dtype)
            digest.update(data)
            documents += int(np.count_nonzero(tokens == manifest.eos_id))
            largest, last = max(largest, int(tokens.max())), int(tokens[-1])
    found = []
    if digest.hexdigest() != shard.sha256:
        found.append(f"{path}: the checksum is {digest.hexdigest()[:12]}..., the manifest says {shard.sha256[:12]}...")
    if largest >= manifest.vocab_size:
        found.append(f"{path}: token {largest} is outside the vocabulary of {manifest.vocab_size}")
    if documents != shard.documents:
        found.append(f"{path}: {documents} documents, the manifest says {shard.documents}")
    if last != manifest.eos_id:
        found.append(f"{path}: the last document is not closed by EOS ({manifest.eos_id})")
    return found


def verify_shards(patterns: list[str], *, ranks: Ranks) -> None:
    """Read the shards of some folders, shared out among all ranks, and compare them with their manifests. Raises DataError."""
    folders = map(read_manifest, expand_globs(patterns, option="data.train_files", suffixes=None))
    shards = [(folder, manifest, shard) for folder, manifest in folders for shard in manifest.shards]
    with ThreadPoolExecutor(_VERIFYING_THREADS) as pool:
        by_shard = pool.map(lambda shard: content_problems(*shard), shards[ranks.rank :: ranks.world_size])
        found = list(itertools.chain.from_iterable(by_shard))
    if found:
        more = f" (and {len(found) - 1} more problems)" if len(found) > 1 else ""
        raise DataError(f"{found[0]}{more}; tokenise it again, and check the folder with `python -m data_prep.verify`")


class TokenStore:
    """All tokens of some folders as one array on disk, with `len`. Opened read-only; nothing is read until it is asked for."""

    def __init__(self, folders: list[str], *, option: str, fingerprint: str, eos_id: int) -> None:
        """Raises DataError for a shard of another tokenizer, of another size than its manifest says, or missing."""
        self.shards: list[tuple[str, np.ndarray]] = []
        digest = hashlib.sha256()
        for folder, manifest in map(read_manifest, _manifests(folders, option)):
            if (manifest.tokenizer, manifest.eos_id) != (fingerprint, eos_id):
                raise DataError(
                    f"{folder}: written with the tokenizer {manifest.tokenizer[:12]}..., but tokenizer.path is {fingerprint[:12]}...; "
                    "give the tokenizer that wrote the shards, or tokenise the text again with this one"
                )
            for shard in manifest.shards:
                if problem := shard_problem(folder, manifest, shard):
                    raise DataError(f"{problem}; tokenise it again, and check it with `python -m data_prep.verify {folder}`")
                digest.update(shard.sha256.encode())
                if shard.tokens:
                    dtype = np.dtype(manifest.dtype).newbyteorder("<")
                    # np.asarray: slices of a memmap object cost ten times those of the plain array over the same pages.
                    tokens = np.asarray(np.memmap(folder / shard.file, dtype=dtype, mode="r"))
                    self.shards.append((str(folder / shard.file), tokens))
        self._ends = list(itertools.accumulate(len(tokens) for _, tokens in self.shards))
        self.fingerprint = f"{len(self.shards)} shards of {len(self)} tokens ({digest.hexdigest()[:16]})"

    def __len__(self) -> int:
        return self._ends[-1] if self.shards else 0

    def read_into(self, out: np.ndarray, first: int) -> int:
        """Copy tokens from position `first` on into `out`; returns how many there were."""
        copied = 0
        index = bisect.bisect_right(self._ends, first)
        while copied < len(out) and index < len(self.shards):
            tokens = self.shards[index][1]
            offset = first + copied - (self._ends[index] - len(tokens))
            piece = tokens[offset : offset + len(out) - copied]
            out[copied : copied + len(piece)] = piece
            copied, index = copied + len(piece), index + 1
        return copied

    def place(self, position: int) -> str:
        """`file:offset` of a token."""
        index = bisect.bisect_right(self._ends, position)
        file, tokens = self.shards[index]
        return f"{file}:{position - (self._ends[index] - len(tokens))}"


def _manifests(patterns: list[str], option: str) -> list[str]:
    if not patterns:
        raise DataError(f"data=tokenized needs {option}: folders written by `python -m data_prep.tokenize`")
    return expand_globs(patterns, option=option, suffixes=None)


class _TokenDocumentReader(DocumentReader):
    """Documents of shards, found by their EOS. State: {"shard", "token", "document"}: shards finished, then within the current one."""

    def __init__(self, shards: list[tuple[str, np.ndarray]], eos_id: int, state: JSON, keep: tuple[int, bool] | None) -> None:
        self._shards = shards
        self._eos_id = eos_id
        self._shard, self._token, self._number = (state["shard"], state["token"], state["document"]) if state else (0, 0, 0)
        self._keep = keep

    def state(self) -> JSON:
        return {"shard": self._shard, "token": self._token, "document": self._number}

    def _read(self) -> Iterator[Document]:
        while self._shard < len(self._shards):
            file, tokens = self._shards[self._shard]
            for end in self._ends(tokens):
                document = Document("", file, self._number + 1, tokens[self._token : end])
                self._token, self._number = end + 1, self._number + 1
                if self._keep is None or (self._number % self._keep[0] == 0) == self._keep[1]:
                    yield document
            self._shard, self._token, self._number = self._shard + 1, 0, 0

    def _ends(self, tokens: np.ndarray) -> Iterator[int]:
        for first in range(self._token, len(tokens), _SCANNED_TOKENS):
            yield from (first + np.flatnonzero(tokens[first : first + _SCANNED_TOKENS] == self._eos_id)).tolist()


class TokenDocuments:
    """Token shards as a source of documents (for packing=pad). Without folders for evaluation, documents are held out as elsewhere."""

    def __init__(self, train: TokenStore, held_out: TokenStore | None, *, eos_id: int, holdout_every: int) -> None:
        self._stores = {"train": train, "eval": held_out or train}
        self._eos_id = eos_id
        self._holdout_every = None if held_out else holdout_every

    def num_shards(self, split: Split) -> int:
        return max(1, len(self._stores[split].shards))

    def fingerprint(self, split: Split) -> str:
        held_out = f", 1 document in {self._holdout_every} held out" if self._holdout_every else ""
        return self._stores[split].fingerprint + held_out

    def open(self, share: Share, state: JSON, tally: StreamTally) -> _TokenDocumentReader:
        shards = self._stores[share.split].shards[share.stream :: share.num_streams]
        if share.seed is not None:
            shards = [shards[i] for i in permutation(len(shards), share.seed)]
        keep = None if self._holdout_every is None else (self._holdout_every, share.split == "eval")
        return _TokenDocumentReader(shards, self._eos_id, state, keep)
