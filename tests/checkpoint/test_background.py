"""Saving in the background: what is written is what was there when the save began, and all ranks' files are published, or none."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from ngpt.checkpoint import background, contents
from ngpt.checkpoint.integrity import problems
from ngpt.checkpoint.store import CheckpointError, CheckpointStore
from ngpt.checkpoint.tensor_file import NotFinite
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart


class Training:
    """Weights, 8-bit and plain state that can be changed in place, as an optimizer does."""

    def __init__(self):
        self.tensors = {"w": torch.zeros(50, 3), "v": torch.zeros(7, dtype=torch.bfloat16)}
        self.moments = StatePart(torch.zeros(150), torch.Size((150,)), 0, 150)
        self.codes = StatePart(torch.zeros(256, dtype=torch.uint8), torch.Size((150,)), 0, 150, torch.zeros(1))

    def step(self):
        for tensor in (*self.tensors.values(), self.moments.values, self.codes.values, self.codes.scales):
            tensor.add_(1)

    def save(self, store, step, **changes):
        return store.save(
            step,
            **{
                "weights": iter(self.tensors.items()),
                "layout": {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()},
                "optimizer": {"w/exp_avg": self.moments, "w/exp_avg_sq": self.codes},
                "random": {"torch": torch.zeros(5, dtype=torch.uint8)},
                "state": {"step": step},
            }
            | changes,
        )


def values_in(store, folder):
    """All the different numbers in a checkpoint's weights and state."""
    found, parts = [], Training()
    store.read_weights(folder, lambda file: found.extend(file.read(name) for name in file.names))
    store.read_optimizer(folder, {"w/exp_avg": parts.moments, "w/exp_avg_sq": parts.codes})
    found += [parts.moments.values, parts.codes.values[:150], parts.codes.scales]
    return {number for tensor in found for number in tensor.flatten().tolist()}


class Gate:
    """Holds the files of a save back until it is opened."""

    def __init__(self, monkeypatch):
        self._open, self._write = threading.Event(), contents.Contents.write
        monkeypatch.setattr(contents.Contents, "write", lambda own, folder: self._held_back(own, folder))

    def _held_back(self, own, folder):
        assert self._open.wait(30)
        return self._write(own, folder)

    def open(self):
        self._open.set()


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "POLL_SECONDS", 0.01)
    return CheckpointStore(tmp_path, keep=2, asynchronous=True, collectives=Collectives())


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def full_disk(*_arguments, **_keywords):
    raise OSError(28, "No space left on device")


def test_weights_and_state_that_change_while_they_are_written_are_saved_as_they_were(store, gate):
    """Weights and state change while they are written in the background | what is saved is what they were"""
    training = Training()
    training.step()
    folder = training.save(store, 1)
    training.step()  # nothing is on disk yet
    assert store.newest() is None
    gate.open()
    for _ in range(20):
        training.step()
    store.wait()
    assert store.newest_good() == folder
    assert problems(folder) == []
    assert values_in(store, folder) == {1.0}


def test_the_copy_is_gone_after_the_save(store):
    Training().save(store, 1)
    pending = store._pending
    store.wait()
    assert pending._write is None


def test_one_save_is_on_its_way_at_most(store, monkeypatch):
    running, most = 0, 0
    original = contents.Contents.write

    def counted(own, folder):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return original(own, folder)

    monkeypatch.setattr(contents.Contents, "write", counted)
    for step in (1, 2, 3):
        Training().save(store, step)
    store.wait()
    assert most == 1
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-0000002", "step-0000003"]


def test_a_failure_in_the_background_surfaces_at_the_next_wait_and_the_next_save_works(store, monkeypatch):
    """A save in the background fails | told at the next wait; the next save works"""
    Training().save(store, 1)
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(contents, "write_optimizer", full_disk)
        Training().save(store, 2)
        with pytest.raises(OSError, match="No space left"):
            store.wait()
    assert store.newest_good().name == "step-0000001"
    assert not list(store.folder.glob(".step-*"))
    Training().save(store, 3)
    store.wait()
    assert store.newest_good().name == "step-0000003"


def test_weights_that_are_not_finite_are_found_in_the_background_too(store):
    """NaN in a weight, saved in the background | not written, and told"""
    training = Training()
    training.tensors["w"][3, 1] = float("nan")
    training.save(store, 1)
    with pytest.raises(NotFinite, match="w has NaN"):
        store.wait()
    assert store.newest() is None


def test_an_error_of_the_program_in_the_background_is_not_lost(store, monkeypatch):
    """An error of the program in the thread that saves | raised in the run"""
    monkeypatch.setattr(contents, "write_optimizer", lambda *_arguments, **_keywords: 1 / 0)
    Training().save(store, 1)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        store.wait()


def test_a_failed_publication_surfaces_too(store, monkeypatch):
    monkeypatch.setattr("ngpt.checkpoint.store.mark_complete", full_disk)
    Training().save(store, 1)
    with pytest.raises(OSError, match="No space left"):
        store.wait()
    assert not list(store.folder.glob("*step-*"))


def test_a_run_that_ends_with_an_error_lets_the_save_finish(store, gate):
    """The run ends with an error while a save is on its way | the save finishes"""
    folder = Training().save(store, 1)
    threading.Timer(0.1, gate.open).start()
    store.close()
    assert store.newest_good() == folder


def test_a_run_that_ends_with_an_error_does_not_wait_for_ever(store, gate, monkeypatch, caplog):
    """The same, and the save hangs | the run ends, and says that the checkpoint is unfinished"""
    monkeypatch.setattr("ngpt.checkpoint.store.SECONDS_TO_CLOSE", 0.1)
    Training().save(store, 1)
    store.close()
    assert "left unfinished" in caplog.text
    gate.open()


# ------------------------------------------------------------------------------------------------------------- several ranks
def save_on_ranks(folder, slow=None, failing=None):
    """Two saves in the background, of which one rank's files are late, or fail in the second one. Returns what was raised, and seen."""
    rank, original, background.POLL_SECONDS = dist.get_rank(), contents.write_optimizer, 0.01
    store = CheckpointStore(folder, keep=5, asynchronous=True, collectives=Collectives())
    halves = Training()
    halves.step()
    part = StatePart(halves.moments.values[:75], torch.Size((150,)), 75 * rank, 75)

    def save(step):
        halves.save(store, step, optimizer={"w/exp_avg": part, "w/exp_avg_sq": halves.codes})

    def late(*arguments, **keywords):
        time.sleep(0.5)
        return original(*arguments, **keywords)

    try:
        contents.write_optimizer = late if rank == slow else original
        save(1)
        seen = store.newest()
        halves.step()
        store.wait()
        contents.write_optimizer = full_disk if rank == failing else original
        save(2)
        halves.step()
        store.wait()
    except OSError as error:
        return seen, str(error), store.newest_good().name
    finally:
        contents.write_optimizer = original
    return seen, values_in(store, store.open(folder / "step-0000001")), values_in(store, store.newest_good())


@pytest.mark.parametrize("slow", [0, 1])
def test_rank_0_publishes_once_the_files_of_all_ranks_are_there(tmp_path, on_ranks, slow):
    assert on_ranks(2, save_on_ranks, tmp_path, slow) == [(None, {1.0}, {2.0})] * 2
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_one_rank_in_the_background_publishes_nothing(tmp_path, on_ranks, failing):
    """A save in the background fails on one of two ranks | nothing is published"""
    expected = (None, f"[Errno 28] rank {failing}: No space left on device", "step-0000001")
    results = on_ranks(2, save_on_ranks, tmp_path, 1, failing)
    assert [result[1:] for result in results] == [expected[1:]] * 2
    assert not list(tmp_path.glob("*step-0000002*"))
