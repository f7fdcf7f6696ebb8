"""A checkpoint is whole or it is none; the newest whole one is found, the old ones go."""

from __future__ import annotations

import json

import pytest
import torch

from ngpt.checkpoint.store import (
    COMPLETE,
    CheckpointError,
    CheckpointStore,
    open_checkpoint,
    read_state,
    read_tensors,
    read_weights,
    step_of,
)


def save(store, step, *, value=1.0, **changes):
    parts = {
        "weights": {"w": torch.full((2, 3), value)},
        "tensors": {"optimizer": {"state": {0: {"m": torch.full((2,), value)}}, "note": "text"}},
        "state": {"progress": {"step": step}},
    } | changes
    return store.save(step, **parts)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_what_was_saved_is_read_back(store):
    weights = {"w": torch.randn(4, 3, dtype=torch.bfloat16).t(), "v": torch.arange(3.0)}  # one of them not contiguous
    folder = save(store, 7, weights=weights, files={"note.txt": b"hello"})
    assert folder.name == "step-0000007"
    assert step_of(folder) == 7
    read = read_weights(open_checkpoint(folder))
    assert all(torch.equal(read[name], weights[name]) and read[name].dtype == weights[name].dtype for name in weights)
    assert torch.equal(read_tensors(folder, "optimizer")["state"][0]["m"], torch.ones(2))
    assert read_state(folder) == {"progress": {"step": 7}}
    assert (folder / "note.txt").read_bytes() == b"hello"
    assert (folder.parent / "latest").read_text() == "step-0000007\n"


def test_the_last_k_are_kept(store):
    for step in (1, 2, 3, 4):
        save(store, step)
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-0000003", "step-0000004"]
    assert store.newest() == store.folder / "step-0000004"


def test_steps_are_compared_as_numbers(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (9_999_999, 10_000_000):
        save(store, step)
    assert store.newest().name == "step-10000000"


def test_a_folder_without_its_mark_is_passed_over_and_said_so(store, caplog):
    save(store, 1)
    (save(store, 2) / COMPLETE).unlink()
    assert store.newest().name == "step-0000001"
    assert "step-0000002" in caplog.text
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        open_checkpoint(store.folder / "step-0000002")


def test_a_save_that_fails_leaves_the_earlier_ones_and_the_next_one_works(store, monkeypatch):
    good = save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            save(store, 2)
    assert store.newest() == good
    assert (store.folder / "latest").read_text() == "step-0000001\n"
    assert save(store, 3) == store.newest()
    assert not list(store.folder.glob(".step-*"))


def test_a_step_that_has_a_checkpoint_keeps_it_untouched(store):
    folder = save(store, 5, value=1.0)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert save(store, 5, value=2.0) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert read_weights(folder)["w"][0, 0] == 1.0


def test_an_unfinished_folder_is_replaced_by_a_save_of_its_step_and_cleared_by_any_other(store):
    for step in (1, 2):
        (save(store, step) / COMPLETE).unlink()
    folder = save(store, 2, value=3.0)
    assert store.newest() == folder
    assert read_weights(folder)["w"][0, 0] == 3.0
    assert [path.name for path in store.folder.glob("step-*")] == ["step-0000002"]


def test_nothing_saved_means_no_newest(store):
    assert store.newest() is None


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "step-0000001")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_broken_file_is_named(store, name):
    folder = save(store, 1)
    (folder / name).write_bytes(b"{ not what it was")
    readers = {"model.safetensors": read_weights, "optimizer.pt": lambda f: read_tensors(f, "optimizer"), "state.json": read_state}
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        readers[name](folder)


def test_a_pickle_that_runs_code_is_refused(store, tmp_path):
    folder = save(store, 1)
    witness = tmp_path / "it-ran"

    class Payload:
        def __reduce__(self):
            return (witness.touch, ())

    torch.save(Payload(), folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        read_tensors(folder, "optimizer")
    assert not witness.exists()


def test_state_must_be_json_without_nan(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(store, 1, state={"progress": {"loss": float("nan")}})
    assert json.dumps(store.newest() is None) == "true"
