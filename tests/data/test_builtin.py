"""The prose of the standard library: what is taken, what is left, and the cache."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ngpt.data import builtin
from ngpt.data.builtin import BuiltinSource, collect, standard_library_prose
from ngpt.data.documents import DataError, Document, Share, SkippedDocuments

MODULE = '''"""A module about rivers, and about the ways in which they can be crossed by those who have no boat.

Example of use, which is not prose and has to go away:

    >>> cross("river")
    True

+------+------+
| left | right|
+------+------+

This paragraph is the second one that is to be kept, since it is a sentence of the kind that people write.
"""

# Comments that go over several lines are prose too, as long as they
# are sentences and not a switched-off piece of the program.


def cross(river):
    """Cross the river and return whether it went well, for which the caller has to wait until the end.

    This paragraph is the second one that is to be kept, since it is a sentence of the kind that people write.
    """
    raise AssertionError("this module is parsed and never imported")
'''


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with everything that has to be skipped."""
    root = tmp_path / "library"
    for folder in ("", "test", "site-packages", "lib2to3", "package/tests", "package/idle_test"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "rivers.py").write_text(MODULE.replace("rivers", folder or "rivers"))
    (root / "broken.py").write_text("def (:\n")
    (root / "not_utf8.py").write_bytes(b'"""caf\xe9"""\n')
    (root / "short.py").write_text('"""Short, but it is a sentence of the English language."""\n')
    return root


def test_modules_are_parsed_to_prose_and_never_imported(library: Path) -> None:
    documents = collect(library)
    assert [document.file for document in documents] == ["rivers.py"]
    assert documents[0].text.splitlines() == [
        "A module about rivers, and about the ways in which they can be crossed by those who have no boat.",
        "Example of use, which is not prose and has to go away:",
        "This paragraph is the second one that is to be kept, since it is a sentence of the kind that people write.",
        "Cross the river and return whether it went well, for which the caller has to wait until the end.",
        "Comments that go over several lines are prose too, as long as they are sentences and not a switched-off piece of the program.",
    ]


def test_a_library_without_sources_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no source files in .*data=local_c4"):
        collect(tmp_path / "nothing")


@pytest.mark.slow
def test_this_python_has_enough_prose() -> None:
    documents = standard_library_prose()
    text = "\n".join(document.text for document in documents)
    assert len(text) > 1_500_000
    assert len(documents) > 300
    paragraphs = text.split("\n")
    assert len(paragraphs) == len(set(paragraphs)), "no paragraph twice"
    assert "\n>>> " not in text
    assert sum(map(str.isascii, paragraphs)) > 0.98 * len(paragraphs)  # which Python it is moves it by half a percent
    assert standard_library_prose() == documents, "the cache gives the same documents"


def test_a_damaged_cache_is_not_believed(library: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """The cache of the built-in text is damaged | made again"""
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    documents = standard_library_prose()
    (cache,) = own_cache.rglob("*.jsonl")
    for damaged in (cache.read_text()[:-30], "", "{}\n", "not json"):
        cache.write_text(damaged)
        assert standard_library_prose() == documents


def test_no_cache_can_be_written_and_nothing_breaks(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache cannot be written | nothing breaks"""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert len(standard_library_prose()) == 1


def test_the_cache_is_named_after_the_python(library: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    standard_library_prose()
    (cache,) = own_cache.rglob("*.jsonl")
    assert cache.parent.name == "ngpt"
    assert builtin.platform.python_version() in cache.name


def test_every_nth_document_is_held_out() -> None:
    documents = [Document(f"text {i}", "file", i) for i in range(1, 11)]
    source = BuiltinSource(documents, holdout_every=4)
    tally = SkippedDocuments(0).tally()
    assert [d.line for d in source.open(Share("eval"), None, tally)] == [4, 8]
    assert [d.line for d in source.open(Share("train"), None, tally)] == [1, 2, 3, 5, 6, 7, 9, 10]


def test_the_collector_never_runs_code() -> None:
    tree = ast.parse(Path(builtin.__file__).read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"exec", "eval", "__import__", "compile"}
