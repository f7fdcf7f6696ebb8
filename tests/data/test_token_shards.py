"""Token shards: what is read is what was written, in an order that mixes everything, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.tokenize import Job, tokenize_file
from ngpt.config.schema import TokenizedDataConfig
from ngpt.data.documents import DataError
from ngpt.data.loader import build_eval_batches
from ngpt.data.packing import IGNORED, RowShape
from ngpt.data.token_rows import RowOrder, TokenizedRows
from ngpt.data.token_shards import TokenStore, read_manifest, smallest_dtype
from ngpt.data.tokenizer import Tokenizer
from ngpt.dist.ranks import Ranks


@pytest.fixture
def folder(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The corpus as shards."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    files = sorted(map(str, corpus.glob("*.json.gz")))
    job = Job(files, str(tmp_path / "tokenizer.model"), tmp_path / "tokens", max_bad_documents=0)
    job.clean()
    job.finish([tokenize_file(file, job.target(i), tokenizer, 0) for i, file in enumerate(files)])
    return tmp_path / "tokens"


def store_of(folder: Path, tokenizer: Tokenizer) -> TokenStore:
    return TokenStore([str(folder)], option="data.train_files", fingerprint=tokenizer.fingerprint, eos_id=tokenizer.eos_id)


def all_tokens(folder: Path) -> np.ndarray:
    return np.concatenate([np.fromfile(file, dtype="<u2") for file in sorted(folder.glob("*.bin"))])


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    change(record)
    (folder / "manifest.json").write_text(json.dumps(record))


def test_one_epoch_predicts_every_token_once(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = all_tokens(folder)
    rows = TokenizedRows(store_of(folder, tokenizer), RowShape(13, "pack", 1, 0), holdout=None, window=32, seed=0)
    assert rows.num_rows == -(-(len(tokens) - 1) // 13)
    taken = rows.take(rows.num_rows)
    assert rows.state() == {"epoch": 1, "row": 0}
    assert taken.num_label_tokens == len(tokens) - 1 == int((taken.labels != IGNORED).sum())
    cut = [tokens[first : first + 14].tolist() for first in range(0, len(tokens) - 1, 13)]
    found = sorted([*inputs[:1], *labels[labels != IGNORED]] for inputs, labels in zip(taken.inputs, taken.labels, strict=True))
    assert found == sorted(cut)


def test_held_out_rows_are_not_trained_on(folder: Path, tokenizer: Tokenizer) -> None:
    store, shape = store_of(folder, tokenizer), RowShape(13, "pack", 1, 0)
    train = TokenizedRows(store, shape, holdout=(7, False), window=32, seed=0)
    held_out = TokenizedRows(store, shape, holdout=(7, True), window=0, seed=0)
    places = [
        [rows.describe(i)["documents"][0] for i in range(len(rows.inputs))]
        for rows in (train.take(train.num_rows), held_out.take(held_out.num_rows))
    ]
    assert not set(places[0]) & set(places[1])
    assert len(places[0]) + len(places[1]) == -(-(len(store) - 1) // 13)


@pytest.mark.parametrize(("count", "window"), [(1, 8), (63, 8), (64, 64), (1000, 100), (1000, 2048), (777, 0)])
def test_an_order_is_a_permutation_and_mixes_the_whole_data(count: int, window: int) -> None:
    order = RowOrder(count, window=window, seed=4)
    rows = order.rows(0, 0, count)
    assert sorted(rows.tolist()) == list(range(count))
    pieces = np.concatenate([order.rows(0, first, min(7, count - first)) for first in range(0, count, 7)])
    assert pieces.tolist() == rows.tolist()
    if count == 1000:
        assert rows.tolist() != order.rows(1, 0, count).tolist()
        assert np.ptp(rows[:100]) > 300, "the first window comes from all over the data"
        assert set(rows[:100].tolist()) != set(order.rows(1, 0, 100).tolist()), "chunks are shuffled anew in every epoch"


def test_padded_rows_are_the_documents(folder: Path, tokenizer: Tokenizer, open_loader: Callable) -> None:
    data = TokenizedDataConfig(train_files=[str(folder)], packing="pad", shuffle_window=0, streams=1, holdout_every=10)
    batch = next(open_loader(data, seq_len=400, micro_batch_size=4))
    documents = [document.tolist() for document in np.split(all_tokens(folder), np.flatnonzero(all_tokens(folder) == 1) + 1)]
    for row, document in zip(batch.input_ids.tolist(), documents, strict=False):
        assert row[: len(document)] == document
        assert set(row[len(document) :]) <= {0}


def test_evaluation_uses_the_held_out_rows(folder: Path, tokenizer: Tokenizer) -> None:
    sizes = {"vocab_size": 300, "seq_len": 16, "micro_batch_size": 4, "max_tokens": 100, "seed": 0}
    data = TokenizedDataConfig(train_files=[str(folder / "manifest.json")], holdout_every=5)
    batches = build_eval_batches(data, tokenizer, ranks=Ranks(0, 1, 0), **sizes)
    tokens = all_tokens(folder)
    assert batches[0].input_ids[0].tolist() == tokens[4 * 16 : 5 * 16].tolist()
    assert batches[0].labels[1].tolist() == tokens[9 * 16 + 1 : 10 * 16 + 1].tolist()
    assert sum(batch.num_label_tokens for batch in batches) == 100


def test_shards_of_another_tokenizer_are_refused(folder: Path, open_loader: Callable) -> None:
    """Token shards of another tokenizer | refused"""
    edit_manifest(folder, lambda record: record.update(tokenizer="f" * 64))
    with pytest.raises(DataError, match=r"written with the tokenizer ffffffffffff\.\.\..*tokenise the text again"):
        open_loader(TokenizedDataConfig(train_files=[str(folder)]))


def test_a_shard_of_another_size_is_refused(folder: Path, open_loader: Callable) -> None:
    """A token shard of another size than its manifest says | refused"""
    with open(folder / "shard-00002.bin", "ab") as out:
        out.write(b"\0\0")
    with pytest.raises(DataError, match=r"shard-00002.bin: \d+ bytes, but the manifest says \d+.*data_prep.verify"):
        open_loader(TokenizedDataConfig(train_files=[str(folder)]))
    (folder / "shard-00002.bin").unlink()
    with pytest.raises(DataError, match=r"shard-00002.bin: No such file"):
        open_loader(TokenizedDataConfig(train_files=[str(folder)]))


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "sub/shard.bin", "..", "", "a\\b", None, 3])
def test_a_manifest_cannot_name_files_outside_its_folder(folder: Path, name: object) -> None:
    """A manifest of shards names files elsewhere | refused"""
    edit_manifest(folder, lambda record: record["shards"][0].update(file=name))
    with pytest.raises(DataError, match=r"is not a file of this folder|not a text"):
        read_manifest(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """A shard that is a link out of its folder | refused"""
    outside = tmp_path / "outside.bin"
    (folder / "shard-00000.bin").rename(outside)
    (folder / "shard-00000.bin").symlink_to(outside)
    with pytest.raises(DataError, match="is not a file of this folder"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("contents", "message"),
    [("", "not a manifest"), ("{}", "not a manifest"), ("[1]", "not a manifest"), ('{"format": "other"}', "format 'other'")],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, contents: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(contents)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    """A folder whose tokenisation did not finish | refused"""
    with pytest.raises(DataError, match=r"manifest.json: No such file.*data_prep.tokenize"):
        read_manifest(tmp_path)


def test_too_few_tokens_for_a_row_are_refused(tmp_path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    with pytest.raises(DataError, match="no row of 100000"):
        TokenizedRows(store_of(folder, tokenizer), RowShape(100000, "pack", 1, 0), holdout=(2, True), window=0, seed=0)


def test_the_smallest_type_that_fits_is_used() -> None:
    assert [smallest_dtype(size) for size in (4096, 65536, 65537)] == ["uint16", "uint16", "uint32"]
