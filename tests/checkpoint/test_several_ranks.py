"""Ranks save and load together: each its own part, all with the same outcome, whatever fails on one of them."""

from __future__ import annotations

import errno
import resource
import shutil
import sys

import pytest
import torch
import torch.distributed as dist

from ngpt.checkpoint import store as store_module
from ngpt.checkpoint.integrity import Manifest
from ngpt.checkpoint.store import CheckpointError, CheckpointStore, share_of
from ngpt.checkpoint.tensor_file import FileRecord
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart

LAYOUT = {name: (torch.float32, torch.Size([3, 4])) for name in "abc"}


def gathered_weights():
    """Weights that exist on rank 0 alone, and only after all ranks have taken part in gathering them, as under ZeRO-3."""
    for number, name in enumerate(LAYOUT):
        tensor = torch.full((3, 4), float(number))
        dist.all_reduce(tensor)
        yield name, tensor / dist.get_world_size() if dist.get_rank() == 0 else torch.empty(0)


def open_store(folder):
    return CheckpointStore(folder, keep=2, collectives=Collectives())


def save(folder, layouts, step=1, failing=None):
    """Save on every rank; on rank `failing[0]` a function (module `failing[1]`, its name) finds the disk full. Returns what was raised."""
    rank = dist.get_rank()
    module, name = (sys.modules[f"ngpt.checkpoint.{failing[1]}"], failing[2]) if failing else (None, "")
    original = getattr(module, name, None)

    def full_disk(*_arguments, **_keywords):
        raise OSError(28, "No space left on device")

    if failing and rank == failing[0]:
        setattr(module, name, full_disk)
    try:
        open_store(folder).save(
            step,
            weights=gathered_weights(),
            layout=LAYOUT,
            optimizer=layouts[rank],
            random={"torch": torch.full((5,), rank, dtype=torch.uint8)},
            state={"saved by": rank},
        )
    except (OSError, ValueError) as error:
        return type(error).__name__, getattr(error, "errno", None), str(error)
    finally:
        if failing:
            setattr(module, name, original)
    return None


def load(folder, layouts):
    store, parts = open_store(folder), layouts[dist.get_rank()]
    checkpoint = store.open(store.newest())
    found = {}
    store.read_weights(checkpoint, lambda file: found.update({name: file.read(name) for name in file.names}))
    store.read_optimizer(checkpoint, parts)
    return parts, found, store.read_state(checkpoint), store.read_random(checkpoint)["torch"][0].item()


def load_what_does_not_fit(folder, layouts):
    parts = layouts[dist.get_rank()]
    with pytest.raises(CheckpointError) as error:
        open_store(folder).read_optimizer(folder / "step-0000001", parts)
    return parts, str(error.value)


def newest_as_rank_0_sees_it(folder):
    if dist.get_rank() != 0:
        folder = folder / "not shown here yet"
    store = open_store(folder)
    return store.newest(), store.open(folder / "step-0000001"), store.read_state(folder / "step-0000001")


def refused_open(folder):
    with pytest.raises(CheckpointError) as error:
        open_store(folder).open(folder / "step-0000009")
    return str(error.value)


@pytest.fixture
def state(parts_kit):
    whole = parts_kit.Whole.random
    return {
        "w/step": whole((), torch.int64, cut=False),
        "w/exp_avg": whole((4, 10), torch.float32, cut=True),
        "w/exp_avg_sq": whole((4, 10), "unsigned", cut=True),
        "w/basis": whole((8, 4), torch.bfloat16, cut=False),
    }


def test_state_goes_from_4_ranks_to_2_to_1_to_3(tmp_path, parts_kit, state, on_ranks):
    plain = {name: whole for name, whole in state.items() if isinstance(whole.kind, torch.dtype)}
    current = parts_kit.layout(plain, 4)
    for step, ranks in enumerate((2, 1, 3), start=1):
        folder = tmp_path / str(step)
        assert on_ranks(len(current), save, folder, current) == [None] * len(current)
        results = on_ranks(ranks, load, folder, [parts_kit.blank(parts) for parts in parts_kit.layout(plain, ranks)])
        expected = parts_kit.layout(plain, ranks)
        for rank, (parts, weights, saved, generator) in enumerate(results):
            assert all(parts_kit.same_bits(parts[name], expected[rank][name]) for name in plain)
            assert {name: weight[0, 0].item() for name, weight in weights.items()} == {"a": 0.0, "b": 1.0, "c": 2.0}
            assert saved == {"saved by": 0}
            assert generator == rank % len(current)
        current = [parts for parts, *_ in results]


def test_8_bit_state_keeps_its_bits_on_the_same_ranks(tmp_path, parts_kit, state, on_ranks):
    layouts = parts_kit.layout(state, 2)
    on_ranks(2, save, tmp_path, layouts)
    for (parts, *_), expected in zip(on_ranks(2, load, tmp_path, [parts_kit.blank(parts) for parts in layouts]), layouts, strict=True):
        assert all(parts_kit.same_bits(parts[name], expected[name]) for name in state)


@pytest.mark.parametrize(
    ("rank", "function"),
    [
        (1, "contents.write_optimizer"),
        (0, "contents.write_optimizer"),
        (0, "contents.write_tensors"),
        (0, "contents.write_durably"),
        (0, "store.sync"),
        (0, "retention.clear_unfinished"),
    ],
)
def test_a_full_disk_of_one_rank_fails_the_save_of_all_and_leaves_the_checkpoints_before(
    tmp_path, parts_kit, state, on_ranks, rank, function
):
    """The disk of one of several ranks is full | the save fails on all, naming the rank; the checkpoint before stays"""
    layouts = parts_kit.layout(state, 2)
    on_ranks(2, save, tmp_path, layouts, 1)
    failed = on_ranks(2, save, tmp_path, layouts, 2, (rank, *function.split(".")))
    assert failed == [("OSError", 28, f"[Errno 28] rank {rank}: No space left on device")] * 2
    assert store_module.find_newest(tmp_path).name == "step-0000001"
    assert (tmp_path / "latest").read_text() == "step-0000001\n"
    assert on_ranks(2, save, tmp_path, layouts, 3) == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.lstrip(".").startswith("step")) == ["step-0000001", "step-0000003"]


def test_a_step_that_has_a_checkpoint_keeps_it(tmp_path, parts_kit, state, on_ranks):
    layouts = parts_kit.layout(state, 2)
    on_ranks(2, save, tmp_path, layouts)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "step-0000001").iterdir()}
    assert on_ranks(2, save, tmp_path, layouts) == [None, None]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "step-0000001").iterdir()} == before


def test_all_ranks_take_rank_0s_word_for_what_there_is(tmp_path, parts_kit, state, on_ranks):
    """Ranks see different folders, as on a slow network file system | all take rank 0's word"""
    on_ranks(2, save, tmp_path, parts_kit.layout(state, 2))
    step = tmp_path / "step-0000001"
    assert on_ranks(2, newest_as_rank_0_sees_it, tmp_path) == [(step, step, {"saved by": 0})] * 2
    messages = on_ranks(2, refused_open, tmp_path)
    assert messages[0] == messages[1]
    assert "rank 0: resume = " in messages[0]
    assert "no such folder" in messages[0]


def test_state_that_does_not_fit_on_one_rank_changes_nothing_on_any(tmp_path, parts_kit, state, on_ranks):
    """Optimizer state that does not fit on one rank | all refuse, naming rank and shapes; no state is changed"""
    layouts = parts_kit.layout(state, 2)
    on_ranks(2, save, tmp_path, layouts)
    others = [parts_kit.blank(parts) for parts in layouts]
    others[1]["w/exp_avg"] = StatePart(torch.zeros(4, 6), torch.Size((4, 11)), 5, 6)
    for parts, message in on_ranks(2, load_what_does_not_fit, tmp_path, others):
        assert "rank 1: " in message
        assert "w: the saved exp_avg is torch.float32 (4, 10), this optimizer keeps torch.float32 (4, 11)" in message
        assert parts["w/step"].values.item() == 7


# ------------------------------------------------------------------------------------------------------------------- faults
ALL_FILES = [
    "model.safetensors",
    "optimizer-00000-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
    ".complete",
]


def fall_back_from_each(folders):
    """What every rank goes on from, where each of the folders has one broken file."""
    return [open_store(folder).newest_good() for folder in folders]


def save_with_a_limit_on_rank_1(folder, layouts, step, largest):
    if dist.get_rank() == 0:
        return save(folder, layouts, step)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        return save(folder, layouts, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_what_is_not_finite(folder, layouts):
    """Rank 1's part of a master weight has a NaN in it."""
    parts = dict(layouts[dist.get_rank()])
    parts["w/master"] = parts.pop("w/exp_avg")
    if dist.get_rank() == 1:
        parts["w/master"].values[0, 0] = float("nan")
    with pytest.raises(CheckpointError) as error:
        save_all(folder, parts)
    return str(error.value), open_store(folder).newest_good()


def save_all(folder, parts):
    open_store(folder).save(2, weights=gathered_weights(), layout=LAYOUT, optimizer=parts, random={"torch": torch.zeros(5)}, state={})


def refused_start(folder):
    if dist.get_rank() == 1:
        folder = folder / "a file" / "checkpoints"
    with pytest.raises(CheckpointError) as error:
        open_store(folder).check_writable()
    return str(error.value)


def test_a_broken_file_of_any_rank_makes_all_ranks_fall_back_together(tmp_path, parts_kit, state, on_ranks):
    """Each file of a checkpoint of two ranks broken in turn, resumed on 2 and on 3 | all ranks fall back to the same checkpoint"""
    layouts = parts_kit.layout(state, 2)
    for step in (1, 2):
        on_ranks(2, save, tmp_path / "good", layouts, step)
    folders = [shutil.copytree(tmp_path / "good", tmp_path / name) for name in ALL_FILES]
    for folder in folders:
        path = folder / "step-0000002" / folder.name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert sorted(path.name for path in (folders[0] / "step-0000002").iterdir()) == sorted(ALL_FILES)
    expected = [folder / "step-0000001" for folder in folders]
    assert on_ranks(2, fall_back_from_each, folders) == [expected] * 2
    assert on_ranks(3, fall_back_from_each, folders) == [expected] * 3
    assert on_ranks(2, fall_back_from_each, [tmp_path / "good"]) == [[tmp_path / "good" / "step-0000002"]] * 2


def test_a_file_that_may_not_grow_on_one_rank_fails_the_save_of_all(tmp_path, parts_kit, state, on_ranks):
    """A file of rank 1 may not grow | the save fails on both, naming rank 1; no litter; the next save works"""
    layouts = parts_kit.layout(state, 2)
    on_ranks(2, save, tmp_path, layouts, 1)
    failed = on_ranks(2, save_with_a_limit_on_rank_1, tmp_path, layouts, 2, 100)
    assert failed == [("OSError", errno.EFBIG, f"[Errno {errno.EFBIG}] rank 1: File too large")] * 2
    assert on_ranks(2, fall_back_from_each, [tmp_path]) == [[tmp_path / "step-0000001"]] * 2
    assert not list(tmp_path.glob(".step-*"))
    assert on_ranks(2, save, tmp_path, layouts, 3) == [None, None]


def test_weights_that_are_not_finite_on_one_rank_are_saved_by_none(tmp_path, parts_kit, state, on_ranks):
    """NaN in the part of a master weight that rank 1 holds | no rank saves; rank and name are told"""
    layouts = parts_kit.layout(state, 2)
    on_ranks(2, save, tmp_path, layouts, 1)
    for message, newest in on_ranks(2, save_what_is_not_finite, tmp_path, layouts):
        assert "rank 1: w/master has NaN or infinity in it" in message
        assert newest == tmp_path / "step-0000001"


def test_a_folder_that_one_rank_cannot_write_to_is_refused_on_all(tmp_path, on_ranks):
    """A folder that one rank cannot write to | refused on all when the run starts, naming the rank"""
    (tmp_path / "a file").write_text("")
    messages = on_ranks(2, refused_start, tmp_path)
    assert "rank 1: Not a directory" in messages[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_each_file_is_verified_by_one_rank_and_none_has_much_more_to_read_than_others(ranks):
    sizes = {"model.safetensors": 100, "state.json": 1} | {f"optimizer-{rank:05d}-of-00008.safetensors": 40 for rank in range(8)}
    manifest = Manifest("run", 1, 8, {name: FileRecord(size, "") for name, size in sizes.items()})
    shares = [share_of(manifest, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= sum(sizes.values()) / ranks + 100
