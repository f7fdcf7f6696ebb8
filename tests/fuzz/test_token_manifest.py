"""Folders of token shards, given anything: the tokens that were written, or a DataError."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpt.data.documents import DataError
from ngpt.data.token_shards import Manifest, Shard, TokenStore, read_manifest, verify_shards
from ngpt.dist.ranks import Ranks

FACTOR = int(os.environ.get("NGPT_FUZZ", "1"))
TOKENIZER = "a1" * 32
ONE_RANK = Ranks(0, 1, 0)
STRANGE = [2**63, 10**400, -1, float("nan"), float("inf"), 1e300, 4.0, "", "..", "../x", "/etc/passwd", "\0", "a\nb", "uint64", "\ud800"]
JUNK = st.one_of(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([*STRANGE, "shard-1.bin", "manifest.json"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 40, 50 and 60 tokens."""
    shards = []
    generator = random.Random(0)
    for index in range(3):
        tokens = np.array([*(generator.randrange(2, 300) for _ in range(39 + 10 * index)), 1], "<u2")
        data, name = tokens.tobytes(), f"shard-{index}.bin"
        (tmp_path / name).write_bytes(data)
        shards.append(Shard(name, f"text-{index}.json", len(tokens), 1, len(data), hashlib.sha256(data).hexdigest()))
    (tmp_path / "manifest.json").write_bytes(Manifest(TOKENIZER, 300, 1, "uint16", tuple(shards)).dump())
    return tmp_path


def tokens_of(folder: Path) -> list[int]:
    store = TokenStore([str(folder)], option="data.train_files", fingerprint=TOKENIZER, eos_id=1)
    out = np.empty(len(store), np.int32)
    assert store.read_into(out, 0) == len(store)
    return out.tolist()


def check(folder: Path, whole: list[int]) -> None:
    """Either an error of ours, or nothing but tokens that were written."""
    with contextlib.suppress(DataError):
        assert tokens_of(folder) == whole


def test_a_damaged_manifest_is_refused_or_gives_the_same_tokens(folder: Path, damaged: Callable[..., Iterator[bytes]]) -> None:
    """Seeded damage to the manifest of shards | refused, or the same tokens"""
    whole, content = tokens_of(folder), (folder / "manifest.json").read_bytes()
    for data in damaged(content, 400):
        (folder / "manifest.json").write_bytes(data)
        check(folder, whole)


@settings(max_examples=250 * FACTOR, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(["", "shards", "shard"]), choice=st.randoms(use_true_random=False), value=JUNK)
def test_a_manifest_with_any_value_anywhere_is_refused_or_gives_the_same_tokens(
    folder: Path, where: str, choice: random.Random, value: Any
) -> None:
    """Any value at any place of the manifest of shards | refused, or the same tokens"""
    saved = (folder / "manifest.json").read_bytes()
    whole, record = tokens_of(folder), json.loads(saved)
    if where == "shards":
        record["shards"][choice.randrange(3)] = value
    else:
        target = record["shards"][choice.randrange(3)] if where else record
        target[choice.choice(sorted(target))] = value
    (folder / "manifest.json").write_text(json.dumps(record))
    try:
        check(folder, whole)
    finally:
        (folder / "manifest.json").write_bytes(saved)


NO_MANIFESTS = [b"", b"null", b"[]", b"{}", b'"x"', b"\xff", b"[" * 10**5, b'{"format": "ngpt-tokens-1"}', b"9" * 10**5]


@pytest.mark.parametrize("content", NO_MANIFESTS, ids=lambda content: repr(content[:10]))
def test_what_is_no_manifest_at_all_is_refused(folder: Path, content: bytes) -> None:
    """Files that are no manifest | refused"""
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(folder)


def test_a_shard_that_is_named_twice_is_refused(folder: Path) -> None:
    """A shard named twice | refused"""
    record = json.loads((folder / "manifest.json").read_bytes())
    record["shards"].append(record["shards"][0])
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"shard-0\.bin' is named twice"):
        read_manifest(folder)


def test_a_manifest_that_leaves_a_shard_out_is_refused(folder: Path) -> None:
    """A manifest that leaves a shard out | refused"""
    record = json.loads((folder / "manifest.json").read_bytes())
    del record["shards"][1]
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"it says \{'tokens': 150, .* of all shards, which is not their sum"):
        read_manifest(folder)


def test_a_shard_cut_or_lengthened_anywhere_is_refused(folder: Path) -> None:
    """A shard cut or lengthened anywhere | refused"""
    whole = (folder / "shard-1.bin").read_bytes()
    for data in [*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + whole]:
        (folder / "shard-1.bin").write_bytes(data)
        with pytest.raises(DataError, match=r"shard-1\.bin: \d+ bytes, but the manifest says 100"):
            tokens_of(folder)


def test_any_flipped_bit_of_a_shard_is_found_before_training(folder: Path) -> None:
    """Bits of a shard flipped | found before training"""
    whole = (folder / "shard-2.bin").read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        (folder / "shard-2.bin").write_bytes(data)
        with pytest.raises(DataError, match=r"shard-2\.bin: the checksum is"):
            verify_shards([str(folder)], ranks=ONE_RANK)


def test_ranks_share_out_the_verification_of_shards(folder: Path) -> None:
    verify_shards([str(folder)], ranks=ONE_RANK)
    (folder / "shard-1.bin").write_bytes(bytes(100))
    verify_shards([str(folder)], ranks=Ranks(0, 3, 0))
    with pytest.raises(DataError, match=r"shard-1\.bin"):
        verify_shards([str(folder)], ranks=Ranks(1, 3, 1))


def test_a_token_that_no_vocabulary_has_is_found_before_training(folder: Path) -> None:
    """A token id beyond the vocabulary, in a shard with a right checksum | refused before training, naming file and id"""
    shards = []
    for index in range(3):
        tokens = np.fromfile(folder / f"shard-{index}.bin", "<u2")
        tokens[7] = 300 if index == 1 else tokens[7]
        data = tokens.tobytes()
        (folder / f"shard-{index}.bin").write_bytes(data)
        shards.append(Shard(f"shard-{index}.bin", f"text-{index}.json", len(tokens), 1, len(data), hashlib.sha256(data).hexdigest()))
    (folder / "manifest.json").write_bytes(Manifest(TOKENIZER, 300, 1, "uint16", tuple(shards)).dump())
    with pytest.raises(DataError, match=r"shard-1\.bin: token 300 is outside the vocabulary of 300"):
        verify_shards([str(folder)], ranks=ONE_RANK)
