"""English prose that every Python installation carries: the standard library's documentation topics and docstrings.

Sources are parsed, never imported. The result depends on the Python version alone and is cached per user.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ngpt.data.atomic import atomic_file
from ngpt.data.documents import JSON, DataError, Document, DocumentReader, Share, Split, StreamTally
from ngpt.data.seeding import permutation

logger = logging.getLogger(__name__)

_COLLECTOR_VERSION = 1
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bootstrap"}
_LEAST_DOCUMENT_CHARACTERS = 200
_LEAST_PARAGRAPH_WORDS = 5
_HEADING = re.compile(r"^([-=~^*+\"'`#.])\1{2,}\s*$")
_ENUMERATED = re.compile(r"^\s*([-*+o]|\(?\d+[.)]|[#])\s+")
_EXAMPLE = re.compile(r"^\s*>>> |^.*::=", re.MULTILINE)  # a doctest or a grammar: the rest of its paragraph is not prose
_DRAWING = re.compile(r"[-=+|_/\\*#.]{4,}| \| ")
_ROLE = re.compile(r":[\w:]+:`([^`]*)`")
_WORD = re.compile(r"[A-Za-z][a-z']*[,.;:!?)]*$")
_COMMON = frozenset(
    "a|an|and|are|as|at|be|by|can|for|from|has|if|in|is|it|not|of|on|or|that|the|this|to|was|when|which|will|with|you".split("|")  # noqa: SIM905
)


def standard_library_prose() -> list[Document]:
    """All documents: one per documentation topic and one per module, in a fixed order. Seconds the first time, then cached.

    Raises DataError where the standard library's sources are not installed.
    """
    cache = _cache_file()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(cache, encoding="utf-8") as lines:
            stored = [json.loads(line) for line in lines]
        if stored and stored[-1] == {"documents": len(stored) - 1}:
            return [Document(record["text"], record["file"], record["line"]) for record in stored[:-1]]
    documents = collect(Path(sysconfig.get_paths()["stdlib"]))
    with contextlib.suppress(OSError):
        _write_cache(cache, documents)
    return documents


def collect(library: Path) -> list[Document]:
    """Read the modules below `library`. Raises DataError if there is next to nothing to read."""
    seen: set[str] = set()
    documents = []
    for path in _files(library):
        for line, texts in _texts_of_file(path):
            text = "\n".join(_new_paragraphs(texts, seen))
            if len(text) >= _LEAST_DOCUMENT_CHARACTERS:
                documents.append(Document(text, path.relative_to(library).as_posix(), line))
    if not documents:
        raise DataError(
            f"data=builtin: the Python standard library has no source files in {library} (a stripped or zipped installation); "
            "use another Python, or your own text with data=local_c4 data.train_files=[...]"
        )
    logger.info("collected %d documents, %.1f MB, from %s", len(documents), sum(len(d.text) for d in documents) / 1e6, library)
    return documents


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = f"builtin-{platform.python_implementation()}-{platform.python_version()}-{_COLLECTOR_VERSION}.jsonl".lower()
    return Path(root) / "ngpt" / name


def _write_cache(cache: Path, documents: list[Document]) -> None:
    records = [{"text": document.text, "file": document.file, "line": document.line} for document in documents]
    with atomic_file(cache) as out:
        for record in [*records, {"documents": len(documents)}]:
            out.write(json.dumps(record).encode() + b"\n")


def _files(library: Path) -> list[Path]:
    """Modules, and the few plain texts beside them (IDLE's history, for one)."""
    found = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith((".py", ".txt"))]
    return sorted(found)


def _texts_of_file(path: Path) -> Iterator[tuple[int, Iterable[str]]]:
    """(line, texts) of each document in a file: a module is one, and so is each topic of the language reference."""
    try:
        source = path.read_bytes().decode()
        if path.suffix == ".txt":
            yield 1, [source]
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    if path.parent.name == "pydoc_data":
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.lineno, [node.value]
    else:
        yield 1, itertools.chain(_docstrings(tree), _comments(source))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module and of all definitions in it; only statements are searched."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for block in ("body", "orelse", "handlers", "finalbody"):
        children = getattr(node, block, ())
        for child in children if isinstance(children, list) else ():
            yield from _docstrings(child)


def _comments(source: str) -> Iterator[str]:
    """Blocks of whole-line comments."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#") and not stripped.startswith("#!"):
            block.append(stripped.lstrip("#"))
        elif block:
            yield textwrap.dedent("\n".join(block))
            block = []


def _new_paragraphs(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    for text in texts:
        for paragraph in _paragraphs(text):
            if paragraph not in seen:
                seen.add(paragraph)
                yield paragraph


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text that are prose, each on one line."""
    for chunk in re.split(r"\n\s*\n", text.expandtabs()):
        chunk = _EXAMPLE.split(chunk, maxsplit=1)[0]
        for lines in _items(chunk):
            words = " ".join(lines).split()
            text = " ".join(words)
            if _is_prose(words) and not _DRAWING.search(text):
                yield _ROLE.sub(r"\1", text).replace("``", "").replace("**", "")


def _items(chunk: str) -> Iterator[list[str]]:
    """The list items of a chunk, or the chunk as a whole; underlines of headings removed."""
    item: list[str] = []
    for line in chunk.splitlines():
        if _HEADING.match(line.strip()):
            continue
        if _ENUMERATED.match(line) and item:
            yield item
            item = []
        item.append(_ENUMERATED.sub("", line))
    yield item


def _is_prose(words: list[str]) -> bool:
    """Mostly plain words, some of them the commonest of English: not code, a table, a signature or a drawing."""
    if len(words) < _LEAST_PARAGRAPH_WORDS:
        return False
    plain = sum(map(bool, map(_WORD.match, words)))
    common = sum(word.lower() in _COMMON for word in words)
    return plain >= 0.55 * len(words) and common >= 0.1 * len(words)


class _ListReader(DocumentReader):
    """Documents of a list in a given order. State: how many have been read."""

    def __init__(self, documents: list[Document], position: int) -> None:
        self._documents = documents
        self._position = position

    def _read(self) -> Iterator[Document]:
        while self._position < len(self._documents):
            self._position += 1
            yield self._documents[self._position - 1]

    def state(self) -> JSON:
        return self._position


class BuiltinSource:
    """Documents in memory; every `holdout_every`-th is held out. Each document counts as a shard: any number of streams can share."""

    def __init__(self, documents: list[Document], holdout_every: int) -> None:
        numbered = list(enumerate(documents, start=1))
        self._documents = {
            "train": [document for number, document in numbered if number % holdout_every],
            "eval": [document for number, document in numbered if number % holdout_every == 0],
        }

    def num_shards(self, split: Split) -> int:
        return len(self._documents[split])

    def fingerprint(self, split: Split) -> str:
        digest = hashlib.sha256()
        for document in self._documents[split]:
            digest.update(document.text.encode())
        return digest.hexdigest()

    def open(self, share: Share, state: JSON, tally: StreamTally) -> _ListReader:
        documents = self._documents[share.split][share.stream :: share.num_streams]
        if share.seed is not None:
            documents = [documents[i] for i in permutation(len(documents), share.seed)]
        return _ListReader(documents, state or 0)
