"""A checkpoint is whole or it is none; the newest whole one is found, the old ones go."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ngpt.checkpoint.integrity import MANIFEST
from ngpt.checkpoint.store import COMPLETE, CheckpointError, CheckpointStore, find_newest, open_checkpoint, read_state, step_of
from ngpt.checkpoint.tensor_file import TensorFile
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart

FILES = ["model.safetensors", "optimizer-00000-of-00001.safetensors", "random.safetensors", "state.json"]


def moments(value):
    return {"w/exp_avg": StatePart(torch.full((2,), value), torch.Size((2,)), 0, 2)}


def save(store, step, *, value=1.0, weights=None, stream=None, **changes):
    weights = weights or {"w": torch.full((2, 3), value)}
    parts = {
        "weights": stream or iter(weights.items()),
        "layout": {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()},
        "optimizer": moments(value),
        "random": {"torch": torch.arange(5, dtype=torch.uint8)},
        "state": {"progress": {"step": step}},
    } | changes
    return store.save(step, **parts)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def read_weights(store, folder):
    """Names and tensors, as an engine reads them: one at a time."""
    found = {}
    store.read_weights(folder, lambda file: found.update({name: file.read(name) for name in file.names}))
    return found


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2, collectives=Collectives())


def test_what_was_saved_is_read_back(store):
    weights = {"w": torch.randn(4, 3, dtype=torch.bfloat16).t(), "v": torch.arange(3.0)}  # one of them not contiguous
    folder = save(store, 7, weights=weights, files={"note.txt": b"hello"})
    assert folder.name == "step-0000007"
    assert step_of(folder) == 7
    read = read_weights(store, store.open(folder))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) and read[name].dtype == weights[name].dtype for name in weights)
    loaded = moments(0.0)
    store.read_optimizer(folder, loaded)
    assert torch.equal(loaded["w/exp_avg"].values, torch.ones(2))
    assert torch.equal(store.read_random(folder)["torch"], torch.arange(5, dtype=torch.uint8))
    assert store.read_state(folder) == {"progress": {"step": 7}}
    assert (folder / "note.txt").read_bytes() == b"hello"
    assert (folder.parent / "latest").read_text() == "step-0000007\n"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "note.txt", MANIFEST, COMPLETE])


def test_the_weights_say_what_hugging_faces_reader_asks_for(store):
    assert TensorFile(save(store, 1) / "model.safetensors").metadata["format"] == "pt"


def test_the_last_k_are_kept(store):
    for step in (1, 2, 3, 4):
        save(store, step)
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-0000003", "step-0000004"]
    assert store.newest() == store.folder / "step-0000004"


def test_steps_are_compared_as_numbers(tmp_path):
    store = CheckpointStore(tmp_path, keep=3, collectives=Collectives())
    for step in (9_999_999, 10_000_000):
        save(store, step)
    assert store.newest().name == "step-10000000"


def test_a_folder_without_its_mark_is_passed_over_and_said_so(store, caplog):
    """A checkpoint folder without `.complete` | passed over, and said so"""
    save(store, 1)
    (save(store, 2) / COMPLETE).unlink()
    assert store.newest().name == "step-0000001"
    assert find_newest(store.folder) == store.newest()
    assert "step-0000002" in caplog.text
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        store.open(store.folder / "step-0000002")


def full_disk(*_arguments, **_keywords):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "at", ["contents.write_tensors", "contents.write_optimizer", "contents.write_durably", "store.sync", "store.mark_complete"]
)
def test_a_save_that_fails_leaves_the_earlier_ones_and_the_next_one_works(store, monkeypatch, at):
    """A save fails at each of its stages | the earlier ones stay, and the next one works"""
    good = save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(f"ngpt.checkpoint.{at}", full_disk)
        with pytest.raises(OSError, match="No space left") as error:
            save(store, 2)
    assert error.value.errno == 28
    assert store.newest() == good
    assert (store.folder / "latest").read_text() == "step-0000001\n"
    assert save(store, 3) == store.newest()
    assert not list(store.folder.glob(".step-*"))


def test_all_weights_are_asked_for_even_if_writing_fails_before_the_first(store, monkeypatch):
    """Other ranks may be gathering each of them together with this one."""
    asked = []

    def weights():
        for name in "abc":
            asked.append(name)
            yield name, torch.zeros(2, 3)

    monkeypatch.setattr("ngpt.checkpoint.contents.write_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(store, 1, stream=weights())
    assert asked == ["a", "b", "c"]


def test_an_error_while_weights_are_gathered_is_raised_as_it_is(store):
    def weights():
        yield "w", torch.zeros(2, 3)
        raise RuntimeError("a peer is gone")

    good = save(store, 1)
    with pytest.raises(RuntimeError, match="a peer is gone"):
        save(store, 2, stream=weights())
    assert store.newest() == good


def test_a_step_that_has_a_checkpoint_keeps_it_untouched(store):
    folder = save(store, 5, value=1.0)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert save(store, 5, value=2.0) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert weights_of(folder)["w"][0, 0] == 1.0


def test_an_unfinished_folder_is_replaced_by_a_save_of_its_step_and_cleared_by_any_other(store):
    for step in (1, 2):
        (save(store, step) / COMPLETE).unlink()
    folder = save(store, 2, value=3.0)
    assert store.newest() == folder
    assert weights_of(folder)["w"][0, 0] == 3.0
    assert [path.name for path in store.folder.glob("step-*")] == ["step-0000002"]


def test_nothing_saved_means_no_newest(store):
    assert store.newest() is None


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "step-0000001")


@pytest.mark.parametrize("content", [b"{ not what it was", b"", None], ids=["garbage", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(store, name, content):
    """A file of a checkpoint without manifest is nonsense | an error that names it"""
    folder = save(store, 1)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    readers = dict(
        zip(
            FILES,
            [
                lambda: read_weights(store, folder),
                lambda: store.read_optimizer(folder, moments(0.0)),
                lambda: store.read_random(folder),
                lambda: read_state(folder),
            ],
            strict=True,
        )
    )
    match = "has no optimizer state" if content is None and name.startswith("optimizer") else name.replace(".", r"\.")
    with pytest.raises(CheckpointError, match=match):
        readers[name]()


def test_weights_that_do_not_fit_are_a_matter_of_the_checkpoint(store):
    """Weights of another shape | an error that names the checkpoint"""

    def refuse(_file):
        raise ValueError("these weights do not fit the model:\n  missing: v")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: these weights do not fit the model:\n  missing: v"):
        store.read_weights(save(store, 1), refuse)


def test_no_file_of_a_checkpoint_is_a_pickle(store):
    assert {path.suffix for path in save(store, 1).iterdir()} == {".safetensors", ".json", ""}


def test_state_must_be_json_without_nan(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(store, 1, state={"progress": {"loss": float("nan")}})
    assert store.newest() is None
