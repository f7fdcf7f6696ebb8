"""Exact resume and independence of the number of ranks: for every source, packed and padded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.tokenize import Job, tokenize_file
from ngpt.config.schema import BuiltinDataConfig, C4DataConfig, DataConfig, LocalC4DataConfig, SyntheticDataConfig, TokenizedDataConfig
from ngpt.data import sources
from ngpt.data.documents import DataError, Document
from ngpt.data.layout import Layout, count_streams
from ngpt.data.loader import Batch
from ngpt.data.tokenizer import Tokenizer
from ngpt.data.train_loader import TrainLoader, merge_states
from ngpt.dist.ranks import Ranks

datasets = pytest.importorskip("datasets")

BATCHES = 72  # micro-batches of 2 rows of 16 tokens; with windows of 8 documents: many windows, several epochs when padded
PER_GLOBAL_BATCH = 4
OpenLoader = Callable[..., TrainLoader]


@pytest.fixture(params=["local_c4", "builtin", "synthetic", "tokenized", "c4"])
def data(request: pytest.FixtureRequest, corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A configuration of every source, small windows, and too little data for one epoch to be enough."""
    common = {"shuffle_window": 8, "streams": 4, "holdout_every": 10}
    if request.param == "local_c4":
        return LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")], **common)
    if request.param == "builtin":
        prose = [Document(f"topic {i}: " + "the quick brown fox jumps. " * (i % 5), "prose.py", i + 1) for i in range(40)]
        monkeypatch.setattr(sources, "standard_library_prose", lambda: prose)
        return BuiltinDataConfig(**common)
    if request.param == "synthetic":
        return SyntheticDataConfig(document_tokens=30, **common)
    if request.param == "tokenized":
        path = tmp_path / "tokenizer.model"
        path.write_bytes(tokenizer.model_bytes)
        files = sorted(map(str, corpus.glob("*.json.gz")))
        job = Job(files, str(path), tmp_path / "tokens", max_bad_documents=0)
        job.clean()
        job.finish([tokenize_file(file, job.target(i), tokenizer, 0) for i, file in enumerate(files)])
        return TokenizedDataConfig(train_files=[str(tmp_path / "tokens")], **common)
    files = sorted(map(str, corpus.glob("*.json.gz")))
    opened = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
    monkeypatch.setattr(sources, "open_hub_dataset", lambda *_: opened)
    return C4DataConfig(**common)


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def rows_of(batches: list[Batch]) -> list[list[int]]:
    return torch.cat([torch.cat([batch.input_ids, batch.labels], dim=1) for batch in batches]).tolist()


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_resume_anywhere_repeats_and_loses_nothing(data: DataConfig, packing: str, open_loader: OpenLoader) -> None:
    data.packing = packing
    loader = open_loader(data)
    uninterrupted, states = [], [json.dumps(loader.state_dict())]
    for _ in range(BATCHES // PER_GLOBAL_BATCH):
        uninterrupted += rows_of(take(loader, PER_GLOBAL_BATCH))
        states.append(json.dumps(loader.state_dict()))
    assert uninterrupted != sorted(uninterrupted)
    per_batch = 2 * PER_GLOBAL_BATCH
    for batches_done in (0, 1, 2, 3, 5, 8, 13, 17):
        resumed = open_loader(data)
        resumed.load_state_dict(json.loads(states[batches_done]))
        rows = rows_of(take(resumed, min(12, BATCHES - PER_GLOBAL_BATCH * batches_done)))
        assert rows == uninterrupted[per_batch * batches_done :][: len(rows)], f"resumed after {batches_done} global batches"
        assert json.dumps(resumed.state_dict()) == states[batches_done + len(rows) // per_batch]


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_more_ranks_give_the_same_global_batches(data: DataConfig, packing: str, open_loader: OpenLoader) -> None:
    data.packing = packing
    single = rows_of(take(open_loader(data), 6 * PER_GLOBAL_BATCH))
    for world_size in (2, 4, 8):
        sizes = {"micro_batch_size": min(2, 8 // world_size)}
        loaders = [open_loader(data, rank=rank, world_size=world_size, **sizes) for rank in range(world_size)]
        per_rank = 8 // world_size // sizes["micro_batch_size"]
        together = [row for _ in range(6) for loader in loaders for row in rows_of(take(loader, per_rank))]
        assert together == single, f"{world_size} ranks"


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_state_saved_at_one_number_of_ranks_loads_at_another(data: DataConfig, packing: str, open_loader: OpenLoader) -> None:
    data.packing = packing
    single = open_loader(data)
    expected = rows_of(take(single, 6 * PER_GLOBAL_BATCH))[3 * 8 :]
    pair = [open_loader(data, rank=rank, world_size=2) for rank in range(2)]
    for loader in pair:
        take(loader, 3 * PER_GLOBAL_BATCH // 2)
    merged = json.loads(json.dumps(merge_states([loader.state_dict() for loader in pair])))

    resumed_alone = open_loader(data)
    resumed_alone.load_state_dict(merged)
    assert rows_of(take(resumed_alone, 3 * PER_GLOBAL_BATCH)) == expected

    saved_alone = open_loader(data)
    take(saved_alone, 3 * PER_GLOBAL_BATCH)
    assert saved_alone.state_dict() == merged
    four = [open_loader(data, rank=rank, world_size=4) for rank in range(4)]
    for loader in four:
        loader.load_state_dict(saved_alone.state_dict())
    assert [row for _ in range(3) for loader in four for row in rows_of(take(loader, 1))] == expected


def test_one_epoch_holds_every_training_document_once(corpus: Path, open_loader: OpenLoader) -> None:
    data = LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")], shuffle_window=8, streams=4, holdout_every=10, packing="pad")
    loader = open_loader(data)
    seen: dict[int, list[str]] = {}
    for batch in take(loader, 400):
        for row in batch.identity()["rows"]:
            seen.setdefault(row["epoch"], []).extend(row["documents"])
    expected = [f"{corpus}/part-{s}.json.gz:{line}" for s in range(5) for line in range(1, 31 + 7 * s) if line % 10]
    assert sorted(seen[0]) == sorted(expected)
    assert sorted(seen[1]) == sorted(expected)
    assert seen[0] != seen[1], "epochs are shuffled differently"


def test_states_are_small_and_plain(data: DataConfig, open_loader: OpenLoader) -> None:
    loader = open_loader(data)
    take(loader, BATCHES)
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert all(len(json.dumps(stream)) < 700 for stream in state["streams"].values())


def test_the_state_is_of_the_batch_handed_out_not_of_the_one_prefetched(data: DataConfig, open_loader: OpenLoader) -> None:
    data.prefetch_batches = 40
    loader = open_loader(data)
    take(loader, PER_GLOBAL_BATCH)
    state = json.dumps(loader.state_dict())
    following = rows_of(take(loader, PER_GLOBAL_BATCH))
    hurried = open_loader(data)
    hurried.load_state_dict(json.loads(state))
    assert rows_of(take(hurried, PER_GLOBAL_BATCH)) == following


def test_a_loader_can_be_sent_back(data: DataConfig, open_loader: OpenLoader) -> None:
    loader = open_loader(data)
    start = loader.state_dict()
    first = rows_of(take(loader, 2 * PER_GLOBAL_BATCH))
    loader.load_state_dict(start)
    assert rows_of(take(loader, 2 * PER_GLOBAL_BATCH)) == first


def test_the_state_in_the_middle_of_a_global_batch_is_refused(data: DataConfig, open_loader: OpenLoader) -> None:
    loader = open_loader(data)
    take(loader, 1)
    with pytest.raises(RuntimeError, match="middle"):
        loader.state_dict()


def test_a_state_of_other_settings_is_refused_by_name(corpus: Path, open_loader: OpenLoader) -> None:
    """Resume with other settings of the data | refused, naming what was and what is"""
    data = LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")])
    state = open_loader(data).state_dict()
    with pytest.raises(DataError, match=r"seq_len was 16, is 32") as caught:
        open_loader(data, seq_len=32, seed=4).load_state_dict(state)
    assert "seed was 3, is 4" in str(caught.value)
    fewer = LocalC4DataConfig(train_files=[str(corpus / "part-[0-3].json.gz")])
    with pytest.raises(DataError, match="data was"):
        open_loader(fewer).load_state_dict(state)


@pytest.fixture(params=["local_c4", "tokenized, pack", "tokenized, pad"])
def files_data(request: pytest.FixtureRequest, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> Callable[[str], DataConfig]:
    """`files_data(folder)`: a configuration of the corpus, or of its tokens, in that folder; it is there in `here` at first."""
    source, packing = request.param.partition(", ")[::2]
    if source == "local_c4":
        shutil.copytree(corpus, tmp_path / "here")
        return lambda folder: LocalC4DataConfig(train_files=[str(tmp_path / folder / "*.json.gz")])
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    job = Job(sorted(map(str, corpus.glob("*.json.gz"))), str(tmp_path / "tokenizer.model"), tmp_path / "here", max_bad_documents=0)
    job.clean()
    job.finish([tokenize_file(file, job.target(i), tokenizer, 0) for i, file in enumerate(job.files)])
    return lambda folder: TokenizedDataConfig(train_files=[str(tmp_path / folder)], packing=packing)


def test_a_corpus_that_moved_continues(files_data: Callable[[str], DataConfig], tmp_path: Path, open_loader: OpenLoader) -> None:
    loader = open_loader(files_data("here"))
    take(loader, PER_GLOBAL_BATCH)
    state = json.dumps(loader.state_dict())
    following = rows_of(take(loader, PER_GLOBAL_BATCH))
    loader.close()
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = open_loader(files_data("there"))
    moved.load_state_dict(json.loads(state))
    assert rows_of(take(moved, PER_GLOBAL_BATCH)) == following


def test_other_files_under_the_same_setting_are_refused(
    files_data: Callable[[str], DataConfig], tmp_path: Path, open_loader: OpenLoader
) -> None:
    """Resume with other files under the same glob | refused"""
    data = files_data("here")
    state = open_loader(data).state_dict()
    lose_the_last_file(tmp_path / "here")
    with pytest.raises(DataError, match=r"data was '5 (files|shards) of \d+ .*, is '4 (files|shards) of \d+ .*Restore the data"):
        open_loader(data).load_state_dict(state)


def test_other_held_out_files_are_refused_and_moved_ones_are_not(
    files_data: Callable[[str], DataConfig], tmp_path: Path, open_loader: OpenLoader
) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "held-out")
    data = files_data("here")
    data.val_files = files_data("held-out").train_files
    state = open_loader(data).state_dict()
    shutil.move(tmp_path / "held-out", tmp_path / "moved")
    data.val_files = files_data("moved").train_files
    open_loader(data).load_state_dict(state)
    lose_the_last_file(tmp_path / "moved")
    with pytest.raises(DataError, match=r"fit this data: val_files was '5 (files|shards) of .*, is '4 (files|shards) of "):
        open_loader(data).load_state_dict(state)


def lose_the_last_file(folder: Path) -> None:
    files = sorted(folder.glob("[!m]*"))
    files[-1].unlink()
    manifest = folder / "manifest.json"
    if manifest.exists():
        record = json.loads(manifest.read_text())
        *shards, lost = record["shards"]
        totals = {name: record[name] - lost[name] for name in record.keys() & lost.keys() if isinstance(lost[name], int)}
        manifest.write_text(json.dumps(record | totals | {"shards": shards}))


def test_a_renamed_file_is_another_file(corpus: Path, tmp_path: Path, open_loader: OpenLoader) -> None:
    shutil.copytree(corpus, tmp_path / "here")
    data = LocalC4DataConfig(train_files=[str(tmp_path / "here/*.json.gz")])
    state = open_loader(data).state_dict()
    (tmp_path / "here/part-0.json.gz").rename(tmp_path / "here/part-00.json.gz")
    with pytest.raises(DataError, match="the saved position does not fit this data: data was '5 files"):
        open_loader(data).load_state_dict(state)


def test_a_part_of_the_state_is_not_enough(corpus: Path, open_loader: OpenLoader) -> None:
    """Resume with the data state of one of two ranks | refused"""
    data = LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")], streams=4)
    with pytest.raises(DataError, match=r"lacks streams \[2, 3\]"):
        open_loader(data).load_state_dict(open_loader(data, rank=0, world_size=2).state_dict())


def test_a_rank_opens_only_the_streams_of_its_rows() -> None:
    layouts = [Layout(512, 16, 8, Ranks(rank, 4, rank)) for rank in range(4)]
    assert [list(layout.streams) for layout in layouts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(layout.foreign_rows() == (0, 0) for layout in layouts)


@pytest.mark.parametrize(("global_batch", "most", "expected"), [(512, 8, 8), (6, 8, 6), (10, 8, 5), (7, 4, 1), (16, 5, 4)])
def test_streams_divide_the_global_batch(global_batch: int, most: int, expected: int) -> None:
    assert count_streams(global_batch, most) == expected


def test_a_global_batch_that_ranks_cannot_share_is_refused(corpus: Path, open_loader: OpenLoader) -> None:
    with pytest.raises(DataError, match="global_batch_size=8 is not a multiple"):
        open_loader(LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")]), micro_batch_size=3)


def test_another_seed_gives_another_order(data: DataConfig, open_loader: OpenLoader) -> None:
    assert rows_of(take(open_loader(data, seed=1), 4)) != rows_of(take(open_loader(data, seed=2), 4))


def test_no_window_keeps_the_order_of_the_files(corpus: Path, open_loader: OpenLoader) -> None:
    data = LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")], shuffle_window=0, streams=1, holdout_every=10, packing="pad")
    documents = [row["documents"][0] for batch in take(open_loader(data), 8) for row in batch.identity()["rows"]]
    lines = [line for line in range(1, 31) if line % 10][:16]
    assert documents == [f"{corpus}/part-0.json.gz:{line}" for line in lines]


def test_every_window_is_shuffled_in_its_own_way(tmp_path: Path, open_loader: OpenLoader) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(64)))
    data = LocalC4DataConfig(train_files=[str(tmp_path / "text.jsonl")], shuffle_window=16, holdout_every=1000, packing="pad")
    names = [row["documents"][0] for batch in take(open_loader(data), 32) for row in batch.identity()["rows"]]
    lines = [int(name.rsplit(":", 1)[1]) for name in names]
    windows = [lines[first : first + 16] for first in range(0, 64, 16)]
    assert [sorted(window) for window in windows] == [list(range(first + 1, first + 17)) for first in range(0, 64, 16)]
    assert len({tuple(line - min(window) for line in window) for window in windows}) == 4
