"""What happens to files and disks: found by name, and the newest good checkpoint stays what a run continues from."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ngpt.checkpoint import retention
from ngpt.checkpoint.integrity import COMPLETE, MANIFEST, Manifest, problems
from ngpt.checkpoint.store import CheckpointError, CheckpointStore, failures_tolerated
from ngpt.checkpoint.tensor_file import NotFinite
from ngpt.dist.collectives import Collectives
from ngpt.loop.stop import stop_on_signals
from ngpt.optim.state import StatePart

FILES = ["model.safetensors", "optimizer-00000-of-00001.safetensors", "random.safetensors", "state.json", MANIFEST, COMPLETE]
NUMBERS = 4096


def contents(step, *, weights=None, moments=None):
    """What a save at `step` is called with; its values tell the step."""
    weights = weights or {"w": torch.full((NUMBERS,), float(step))}
    part = StatePart(torch.full((NUMBERS,), float(step)) if moments is None else moments, torch.Size((NUMBERS,)), 0, NUMBERS)
    return {
        "weights": iter(weights.items()),
        "layout": {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()},
        "optimizer": {"w/exp_avg": part},
        "random": {"torch": torch.full((5000,), step % 256, dtype=torch.uint8)},
        "state": {"step": step},
    }


def save(store, step, **changes):
    return store.save(step, **contents(step, **changes))


def open_store(folder, **settings):
    return CheckpointStore(folder, **({"keep": 2, "collectives": Collectives()} | settings))


def loaded(store, folder):
    """The step that each file of a checkpoint tells."""
    found, part = {}, contents(0)["optimizer"]
    store.read_weights(folder, lambda file: found.update({name: file.read(name) for name in file.names}))
    store.read_optimizer(folder, part)
    values = {*found["w"].tolist(), *part["w/exp_avg"].values.tolist(), *store.read_random(folder)["torch"].tolist()}
    return values | {float(store.read_state(folder)["step"])}


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "checkpoints")


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position * (len(content) - 1) // 100] ^= 1
    path.write_bytes(content)


def cut(path, percent):
    os.truncate(path, path.stat().st_size * percent // 100)


DAMAGE = {
    "first byte flipped": lambda path: flip(path, 0),
    "byte in the middle flipped": lambda path: flip(path, 50),
    "last byte flipped": lambda path: flip(path, 100),
    "cut to nothing": lambda path: cut(path, 0),
    "first half left": lambda path: cut(path, 50),
    "end cut off": lambda path: cut(path, 99),
    "byte added": lambda path: path.open("ab").write(b"x"),
    "missing": lambda path: path.unlink(),
}


# ------------------------------------------------------------------------------------------------------------ broken files
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named_and_the_run_continues_from_the_checkpoint_before(tmp_path, caplog, name):
    """Each file of the newest checkpoint in turn: a byte flipped, cut short, emptied, lengthened, missing | named; the run goes on from
    the checkpoint before"""
    save(open_store(tmp_path / "0"), 1)
    save(open_store(tmp_path / "0"), 2)
    for number, (what, damage) in enumerate(DAMAGE.items(), start=1):
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(number))
        damage(folder / "step-0000002" / name)
        caplog.clear()
        store = open_store(folder)
        assert store.newest_good() == folder / "step-0000001", what
        assert loaded(store, store.newest_good()) == {1.0}, what
        assert name in caplog.text, what
        assert "passing over" in caplog.text, what
        if (folder / "step-0000002" / COMPLETE).exists():
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                store.open(folder / "step-0000002")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_step_is_found(store, caplog, name):
    """Each file of a checkpoint in turn replaced by that of another step | named; the checkpoint before is taken"""
    first, second = save(store, 1), save(store, 2)
    shutil.copyfile(first / name, second / name)
    assert store.newest_good() == first
    assert name in caplog.text
    assert "step 1" in caplog.text or not name.endswith("safetensors")


def test_a_file_of_the_same_step_of_another_run_is_found(store, tmp_path, caplog):
    """Weights replaced by those of the same step of another run | named with where they are from; the checkpoint before is taken"""
    other = open_store(tmp_path / "other")
    first, second = save(store, 1), save(store, 2)
    shutil.copyfile(save(other, 2) / "model.safetensors", second / "model.safetensors")
    assert store.newest_good() == first
    assert "model.safetensors: its content is not what was saved (it is of step 2 of another run)" in caplog.text


def test_a_whole_checkpoint_of_another_run_is_passed_over_unless_it_is_asked_for(store, tmp_path, caplog):
    """A whole checkpoint of another run copied in | passed over, unless `resume` names it"""
    first = save(store, 1)
    foreign = shutil.copytree(save(open_store(tmp_path / "other"), 2), store.folder / "step-0000002")
    assert store.newest_good() == first
    assert "it is of another run" in caplog.text
    assert store.open(foreign) == foreign


def test_checkpoints_stay_readable_where_the_runs_identifier_is_lost_or_broken(store):
    """The run's identifier is lost or garbage | checkpoints load all the same, and the next save finds it again"""
    folder = save(store, 1)
    (store.folder / "run-id").write_bytes(b"\xff nonsense")
    assert store.newest_good() == folder
    (store.folder / "run-id").unlink()
    assert store.newest_good() == folder
    newer = save(open_store(store.folder), 2)
    assert [Manifest.from_bytes((each / MANIFEST).read_bytes()).run for each in (folder, newer)] == [open_store(store.folder)._run_id()] * 2


def test_a_checkpoint_under_another_steps_name_is_found(store, caplog):
    """A checkpoint copied under another step's name | found by its manifest; the true one is taken"""
    first = save(store, 1)
    shutil.copytree(first, store.folder / "step-0000005")
    assert store.newest_good() == first
    assert "its manifest says step 1" in caplog.text


def test_state_of_another_number_of_ranks_beside_ours_is_found(store, caplog):
    """A file of a save by another number of ranks among the others | named; the checkpoint before is taken"""
    first, second = save(store, 1), save(store, 2)
    shutil.copyfile(second / FILES[1], second / "optimizer-00001-of-00002.safetensors")
    assert store.newest_good() == first
    assert "optimizer-00001-of-00002.safetensors does not belong to this checkpoint" in caplog.text


def test_the_newest_is_the_one_with_the_highest_step_whatever_the_clock_said(store, seen):
    """The clock jumped back between saves, so that older checkpoints have newer times | the one of the highest step is taken and kept"""
    for step in (1, 2, 3):
        folder = save(store, step)
        for path in [folder, *folder.iterdir()]:
            os.utime(path, (1e9 - step, 1e9 - step))
    assert store.newest_good().name == "step-0000003"
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-0000002", "step-0000003"]
    seen(store.newest_good().name)


@pytest.mark.parametrize("content", ["", "garbage\n", "step-0000009\n", "step-0000001\n"])
def test_the_pointer_to_the_latest_is_for_people_and_leads_no_run_astray(store, content):
    """`latest` is empty, garbage, names a missing or an old checkpoint | the newest good one is taken"""
    save(store, 1)
    newest = save(store, 2)
    (store.folder / "latest").write_text(content)
    assert store.newest_good() == newest


def test_if_all_checkpoints_are_broken_nothing_starts_at_step_0_by_itself(store):
    """Every checkpoint is broken | an error with the reason of each; nothing is changed, and nothing begins at step 0 again"""
    for step in (1, 2):
        flip(save(store, step) / "model.safetensors", 50)
    before = sorted(store.folder.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        open_store(store.folder).newest_good()
    assert "step-0000002: " in str(error.value)
    assert "step-0000001: " in str(error.value)
    assert "step 0 by itself" in str(error.value)
    assert sorted(store.folder.rglob("*")) == before


def test_if_all_step_folders_are_gone_nothing_starts_at_step_0_by_itself(store):
    """All step folders were removed by hand | an error; nothing begins at step 0 again"""
    shutil.rmtree(save(store, 1))
    with pytest.raises(CheckpointError, match="there is no step folder in it"):
        store.newest_good()


def test_a_run_whose_first_save_was_cut_off_starts_at_step_0_and_says_so(store, caplog):
    """The very first save was cut off | the run starts at step 0 and says so"""
    folder = save(store, 1)
    (folder / COMPLETE).unlink()
    (store.folder / "latest").unlink()
    assert store.newest_good() is None
    assert "its save was cut off" in caplog.text


def test_a_checkpoint_without_a_manifest_from_before_there_were_any_loads_with_a_warning(store, caplog):
    """A checkpoint from before there were manifests | loads with a warning: not verified"""
    folder = save(store, 1)
    (folder / MANIFEST).unlink()
    (folder / COMPLETE).write_bytes(b"")
    assert store.newest_good() == folder
    assert store.open(folder) == folder
    assert loaded(store, folder) == {1.0}
    assert "not verified" in caplog.text


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a/b", ""])
def test_a_manifest_cannot_name_files_outside_its_folder(name):
    """A manifest names ../x, /etc/passwd and the like | refused"""
    files = {name: {"size": 1, "sha256": ""}}
    content = json.dumps({"format": "ngpt checkpoint", "version": 1, "run": "r", "step": 1, "ranks": 1, "files": files})
    with pytest.raises(ValueError, match="a file is called"):
        Manifest.from_bytes(content.encode())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(store, tmp_path, name):
    """A malicious pickle in place of each file, verified or not | refused, and never run"""
    first, second = save(store, 1), save(store, 2)
    (second / name).write_bytes(pickle.dumps(Payload(tmp_path / "was run")))
    assert store.newest_good() == first
    (second / MANIFEST).unlink(missing_ok=True)  # and where nothing is verified
    (second / COMPLETE).write_bytes(b"")
    if name in FILES[:4]:
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            loaded(store, store.open(second))
    assert not (tmp_path / "was run").exists()


# -------------------------------------------------------------------------------------- going on after a checkpoint was broken
def test_a_run_that_fell_back_replaces_the_broken_checkpoint_and_keeps_its_files_aside(store):
    """A run that fell back comes to the broken step again | a good checkpoint takes its place, the broken files stay aside"""
    save(store, 1)
    flip(save(store, 2) / "model.safetensors", 50)
    again = open_store(store.folder)
    assert again.newest_good().name == "step-0000001"
    assert loaded(again, save(again, 2)) == {2.0}
    assert problems(store.folder / "step-0000002") == []
    assert [path.name for path in retention.passed_over(store.folder)] == ["step-0000002.passed-over"]


def test_a_run_that_fell_back_and_was_stopped_before_the_broken_step_continues_from_what_it_saved_last(store):
    """A run that fell back is stopped before the step that was broken, and that one is mended | the run's own newest save counts"""
    save(store, 2)
    flip(save(store, 9) / "model.safetensors", 50)
    again = open_store(store.folder)
    again.newest_good()
    newest = save(again, 5)
    flip(store.folder / "step-0000009.passed-over" / "model.safetensors", 50)  # whole again, but not of this course of the run
    assert open_store(store.folder).newest_good() == newest


def test_what_was_passed_over_goes_when_it_is_older_than_all_that_is_kept(store):
    """A checkpoint that was passed over | goes when it is older than all that are kept"""
    save(store, 1)
    flip(save(store, 2) / "model.safetensors", 50)
    again = open_store(store.folder)
    again.newest_good()
    for step in (2, 3, 4):
        save(again, step)
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-0000003", "step-0000004"]


# --------------------------------------------------------------------------------------------------------------- retention
def test_a_broken_checkpoint_does_not_count_among_those_that_are_kept(store):
    """keep=2, and one of the two is broken | an older good one stays"""
    save(store, 1)
    cut(save(store, 2) / "model.safetensors", 50)
    save(store, 3)
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-0000001", "step-0000002", "step-0000003"]
    save(store, 4)
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-0000003", "step-0000004"]


def test_the_only_good_checkpoint_is_never_removed(tmp_path):
    """keep=1, and all but the oldest checkpoint are broken | the only good one stays"""
    store = open_store(tmp_path, keep=1)
    save(store, 1)
    for step in (2, 3, 4):
        (tmp_path / f"step-000000{step}").mkdir()
        (tmp_path / f"step-000000{step}" / COMPLETE).touch()
        (tmp_path / f"step-000000{step}" / MANIFEST).write_bytes(b"{}")
    assert retention.to_remove(tmp_path, keep=1) == []
    store._prune()
    assert loaded(store, store.newest_good()) == {1.0}


def test_milestones_stay(tmp_path):
    store = open_store(tmp_path, keep=1, keep_every=3)
    for step in range(1, 8):
        save(store, step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-0000003", "step-0000006", "step-0000007"]


def test_an_old_checkpoint_that_cannot_be_removed_fails_no_save(store, monkeypatch, caplog):
    """An old checkpoint cannot be removed | the new one is published; a warning"""

    def refuse(_folder):
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr(retention, "remove", refuse)
    for step in (1, 2, 3):
        save(store, step)
    assert store.newest_good().name == "step-0000003"
    assert "an old checkpoint could not be removed" in caplog.text


# ------------------------------------------------------------------------------------------------------- killed while saving
FAULT_POINTS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def in_child(body):
    """Run `body` in a process of its own. Returns its exit status as os.waitpid has it."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(3)
    return os.waitpid(child, 0)[1]


def save_and_die_at(folder, call):
    """Save step 3; kill -9 this process right before the system call with this number, counted from 0."""
    left = call

    def watched(original):
        def instead(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return instead

    for name in FAULT_POINTS:
        setattr(os, name, watched(getattr(os, name)))
    save(open_store(folder), 3)
    os._exit(0)


def test_a_kill_at_any_moment_of_a_save_leaves_it_whole_or_not_at_all(tmp_path):
    """kill -9 before each fsync, rename, mkdir and unlink of a save in turn | the checkpoint is there whole or not at all; the next save
    works"""
    for step in (1, 2):
        save(open_store(tmp_path / "before"), step)
    newest_after = []
    for call in range(200):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(call))
        status = in_child(lambda folder=folder, call=call: save_and_die_at(folder, call))
        store = open_store(folder)
        newest = store.newest_good()
        newest_after.append(newest.name)
        assert loaded(store, newest) == {float(newest.name[-1])}
        assert loaded(store, save(store, 4)) == {4.0}
        assert len(list(folder.glob(".step-*"))) == 0
        assert len(list(folder.glob("step-*"))) == 2
        shutil.rmtree(folder)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert call > 15
    assert newest_after == sorted(newest_after)
    assert set(newest_after) == {"step-0000002", "step-0000003"}


def test_nothing_gets_its_name_before_it_is_on_disk(store, monkeypatch, seen):
    """The power fails at any moment of a save, as far as the order of its system calls tells | every file is forced to disk before the
    folder has its name, the folder's name before the mark, the mark before `latest`"""
    fsync, rename, replace = os.fsync, os.rename, os.replace
    on_disk, named, last = set(), [], []

    def watched_fsync(file):
        fsync(file)
        on_disk.add(os.fstat(file).st_ino)
        last[:] = [os.fstat(file).st_ino]

    def naming(original):
        def instead(source, target):
            source, target = Path(source), Path(target)
            files = [source, *source.iterdir()] if source.is_dir() else [source]
            assert [path.name for path in files if path.stat().st_ino not in on_disk] == []
            assert not source.is_dir() or last == [source.stat().st_ino], "the entries of a folder, after all of its files"
            assert store.folder.stat().st_ino in on_disk or not named, "what was named before, before anything else is"
            original(source, target)
            on_disk.discard(target.parent.stat().st_ino)  # until it is forced to disk again, it does not have that name
            named.append(target.name)

        return instead

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", naming(rename))
    monkeypatch.setattr(os, "replace", naming(replace))
    folder = save(store, 1)
    assert named[-3:] == [folder.name, COMPLETE, "latest"]
    assert {store.folder.stat().st_ino, folder.stat().st_ino} <= on_disk
    seen(f"in this order: {', '.join(named)}; each forced to disk before it had its name, and its folder after")


@pytest.mark.parametrize("size", [0, 100, NUMBERS * 2, NUMBERS * 4 + 50])
def test_a_kill_in_the_middle_of_a_file_leaves_the_checkpoints_before(store, size):
    """The process dies in the middle of a file, at four sizes | the checkpoint before is the newest, and the next save works"""
    before = save(store, 1)

    def die_at_size():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(store, 2)

    status = in_child(die_at_size)
    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert open_store(store.folder).newest_good() == before
    assert loaded(store, save(open_store(store.folder), 2)) == {2.0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_during_a_save_lets_it_finish(store, number):
    """SIGTERM, SIGUSR1 or SIGINT in the middle of a save | the save finishes; then the run stops"""

    def weights():
        os.kill(os.getpid(), number)
        yield "w", torch.full((NUMBERS,), 1.0)

    with stop_on_signals() as stop:
        folder = store.save(1, **contents(1) | {"weights": weights()})
        assert stop.signal == number
    assert loaded(store, store.newest_good()) == {1.0}
    assert folder == store.newest_good()


# -------------------------------------------------------------------------------------------------------- disks that refuse
@pytest.mark.parametrize("name", ["random.safetensors", "model.safetensors", "optimizer-00000-of-00001.safetensors"])
def test_a_file_that_may_not_grow_fails_the_save_and_leaves_no_litter(store, name):
    """Each file of a save in turn may not grow (RLIMIT_FSIZE) | the save fails, no litter; the checkpoint before stays, the next save works

    The limit stops the first file that is larger than one byte less than this one, which is each in turn.
    """
    before = save(store, 1)
    size = (before / name).stat().st_size - 1

    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            save(store, 2)
        except OSError as error:
            good = error.errno == errno.EFBIG and not list(store.folder.glob(".step-*")) and store.newest_good() == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os._exit(0 if good and loaded(store, save(store, 3)) == {3.0} else 4)

    assert os.waitstatus_to_exitcode(in_child(body)) == 0


def test_too_little_space_is_found_before_a_file_is_begun(store, monkeypatch):
    """Less space than a checkpoint needs | found before a file is begun, with both figures"""
    before = save(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: namedtuple("Usage", "free")(1000))
    monkeypatch.setattr("ngpt.checkpoint.contents.write_tensors", None)
    with pytest.raises(OSError, match=r"a checkpoint needs 0\.001 GB, and 0\.000 GB are free in") as error:
        save(store, 2)
    assert error.value.errno == errno.ENOSPC
    assert store.newest_good() == before
    assert not list(store.folder.glob(".step-*"))


@pytest.fixture
def unprivileged_folder():
    """A folder that belongs to the user who runs the test, who is not root here, as nothing is read-only to root."""
    is_root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp())
    if is_root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder / "checkpoints"
    if is_root:
        os.seteuid(0)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(stat.S_IRWXU)
    shutil.rmtree(folder)


def test_a_folder_that_turns_read_only_fails_the_save_and_leaves_the_checkpoints_before(unprivileged_folder):
    """The checkpoint folder turns read-only (as no root) | the save fails, the checkpoint before stays; writable again, the next save
    works"""
    store = open_store(unprivileged_folder)
    before = save(store, 1)
    unprivileged_folder.chmod(0o555)
    with pytest.raises(PermissionError):
        save(store, 2)
    assert store.newest_good() == before
    assert loaded(store, before) == {1.0}
    unprivileged_folder.chmod(0o755)
    assert loaded(store, save(store, 3)) == {3.0}


def test_a_read_only_folder_is_refused_at_the_start(unprivileged_folder):
    """A read-only checkpoint folder (as no root) | refused when the run starts"""
    unprivileged_folder.mkdir()
    unprivileged_folder.chmod(0o555)
    with pytest.raises(CheckpointError, match="no checkpoints can be written to"):
        open_store(unprivileged_folder).check_writable()


def test_a_file_in_place_of_the_folder_is_refused_at_the_start(tmp_path):
    """A file where the checkpoint folder should be | refused when the run starts"""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoints can be written to"):
        open_store(tmp_path / "checkpoints").check_writable()


def test_a_folder_removed_while_the_run_goes_on_is_made_again(store):
    """The checkpoint folder is removed while the run goes on | made again by the next save"""
    store.check_writable()
    save(store, 1)
    shutil.rmtree(store.folder)
    assert loaded(store, save(store, 2)) == {2.0}
    assert store.newest_good().name == "step-0000002"


def test_a_save_that_fails_is_warned_of_and_the_run_goes_on(caplog):
    """A save fails, checkpoint.on_error=warn | a warning; the run goes on"""
    with failures_tolerated("warn"):
        raise OSError(28, "No space left on device")
    assert "No space left on device" in caplog.text
    assert "the run goes on" in caplog.text


@pytest.mark.parametrize(("on_error", "last"), [("stop", False), ("warn", True)])
def test_a_save_that_fails_ends_the_run_if_asked_or_if_it_is_the_last(on_error, last):
    """A save fails, checkpoint.on_error=stop, or it is the last of the run | the run ends with an error"""
    with pytest.raises(CheckpointError, match="No space left"), failures_tolerated(on_error, last=last):
        raise OSError(28, "No space left on device")


def test_other_errors_of_a_save_are_never_swallowed():
    """An error of the program during a save | not taken for a failure of the disk"""
    with pytest.raises(ZeroDivisionError), failures_tolerated("warn"):
        _ = 1 / 0


# -------------------------------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_written(store, dtype, value):
    """NaN, Inf or -Inf in one weight, three dtypes | the checkpoint is not written; the one before stays"""
    before = save(store, 1)
    weights = {"v": torch.zeros(3, dtype=dtype), "w": torch.zeros(NUMBERS, dtype=dtype)}
    weights["w"][77] = value
    with pytest.raises(NotFinite, match="w has NaN or infinity in it"):
        save(store, 2, weights=weights)
    assert store.newest_good() == before
    assert not list(store.folder.glob(".step-*"))


def test_masters_that_are_not_finite_are_never_written(store):
    """NaN in a master weight | the checkpoint is not written"""
    broken = StatePart(torch.tensor([1.0, float("nan")]), torch.Size((2,)), 0, 2)
    with pytest.raises(NotFinite, match="w/master has NaN"):
        store.save(1, **contents(1) | {"optimizer": {"w/master": broken}})
    assert store.newest_good() is None


def test_weights_as_large_as_they_can_be_are_finite(store):
    weights = {"w": torch.tensor([torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min] * 2000, dtype=torch.bfloat16)}
    save(store, 1, weights=weights)
    assert store.newest_good() is not None
