"""Optimizer state of any layout is loaded by any other, bit for bit; what does not fit is named and changes nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ngpt.checkpoint.agreement import Agreement
from ngpt.checkpoint.optimizer_files import file_name, fill_, find_fitting, parts_to_write, write_optimizer
from ngpt.checkpoint.tensor_file import CheckpointError, TensorFile, write_tensors
from ngpt.dist.collectives import Collectives
from ngpt.optim.quantization import BLOCK
from ngpt.optim.state import StatePart

PLAIN_KINDS = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


class OneOf(Agreement):
    """Rank `rank` of several that all hold the same names, without processes: flags of all ranks are computed from `layouts`."""

    def __init__(self, rank, layouts):
        super().__init__(Collectives())
        self.rank, self.size, self._layouts = rank, len(layouts), layouts

    def gather(self, data):
        return [bytes(parts[name].is_whole for name in sorted(parts)) for parts in self._layouts]


def save(folder, layouts, step=5, busy_bytes=0):
    for rank, parts in enumerate(layouts):
        own = parts_to_write(parts, OneOf(rank, layouts), busy_bytes=busy_bytes)
        write_optimizer(folder, own, rank=rank, ranks=len(layouts), step=step)


def load(folder, parts):
    fill_(parts, find_fitting(folder, parts))
    return parts


@pytest.fixture
def small(parts_kit):
    """A state with every kind of part, as of a small model."""
    whole = parts_kit.Whole.random
    return {
        "embed/step": whole((), torch.int64, cut=False),
        "embed/exp_avg": whole((1000,), torch.float32, cut=True),
        "up/step": whole((), torch.int64, cut=False),
        "up/exp_avg": whole((4, 30), "signed", cut=True),
        "up/exp_avg_sq": whole((4, 30), "unsigned", cut=True),
        "up/history": whole((3, 4, 30), torch.bfloat16, cut=True),
        "up/basis": whole((8, 4), torch.bfloat16, cut=False),
        "up/gram": whole((3, 3), torch.float64, cut=False),
    }


tensors = st.tuples(st.lists(st.integers(0, 40), max_size=3).map(tuple), st.sampled_from([*PLAIN_KINDS, torch.int64]), st.booleans())


@given(st.lists(tensors, max_size=5), st.lists(st.integers(1, 5), min_size=2, max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_through_any_chain_of_layouts_no_bit_is_lost(tmp_path_factory, parts_kit, shapes, chain):
    state = {f"p{i}/s{i}": parts_kit.Whole.random(shape, kind, cut=cut and bool(shape)) for i, (shape, kind, cut) in enumerate(shapes)}
    current = parts_kit.layout(state, chain[0])
    for ranks in chain[1:]:
        folder = tmp_path_factory.mktemp("step")
        save(folder, current, busy_bytes=100)
        current = [load(folder, parts_kit.blank(parts)) for parts in parts_kit.layout(state, ranks)]
        expected = parts_kit.layout(state, ranks)
        assert all(parts_kit.same_bits(mine[name], right[name]) for mine, right in zip(current, expected, strict=True) for name in state)


eight_bits = st.tuples(
    st.one_of(st.tuples(st.integers(1, 3 * BLOCK)), st.tuples(st.integers(1, 5), st.integers(1, BLOCK)), st.just((2, 3, 50))),
    st.sampled_from(["signed", "unsigned"]),
)


@given(eight_bits, st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_8_bit_state_keeps_its_bits_in_its_layout_and_goes_to_the_nearest_levels_in_another(
    tmp_path_factory, parts_kit, kind, before, after
):
    folder = tmp_path_factory.mktemp("step")
    state = {"p/m": parts_kit.Whole.random(*kind, cut=True)}
    saved = parts_kit.layout(state, before)
    save(folder, saved)
    loaded = [load(folder, parts_kit.blank(parts))["p/m"] for parts in parts_kit.layout(state, after)]
    as_saved = torch.cat([parts_kit.values_of(parts["p/m"]) for parts in saved], dim=-1)
    # From the values alone, by an independent way: quantize what the saved parts stand for, cut as the new layout cuts it.
    requantized = parts_kit.layout({"p/m": parts_kit.Whole(as_saved, kind[1], True)}, after)
    for mine, right, (start, stop) in zip(loaded, requantized, parts_kit.cuts(as_saved.shape[-1], after), strict=True):
        original = [parts["p/m"] for parts in saved if (parts["p/m"].start, parts["p/m"].count) == (start, stop - start)]
        assert parts_kit.same_bits(mine, original[0] if original else right["p/m"])


def test_codes_and_scales_that_rounding_to_nearest_would_not_give_keep_their_bits_too(tmp_path, parts_kit):
    """As stochastic rounding leaves them: the largest value of a block below the power of two that was set aside for it."""
    scales = torch.tensor([float("nan"), 2.0, 0.0])
    part = StatePart(torch.randint(0, 200, (2 * BLOCK + 9,), dtype=torch.uint8), torch.Size((5000,)), 7, 2 * BLOCK + 9, scales)
    write_optimizer(tmp_path, {"p/v": part}, rank=0, ranks=1, step=1)
    loaded = load(tmp_path, parts_kit.blank({"p/v": part}))["p/v"]
    assert torch.equal(loaded.values, part.values)
    assert torch.equal(loaded.scales.view(torch.int32), scales.view(torch.int32))


def test_a_long_8_bit_vector_is_requantized_in_stretches(tmp_path, parts_kit, monkeypatch):
    monkeypatch.setattr("ngpt.checkpoint.optimizer_files.REQUANTIZED_AT_ONCE", 2 * BLOCK)
    state = {"p/m": parts_kit.Whole.random((9 * BLOCK + 17,), "signed", cut=True)}
    save(tmp_path, parts_kit.layout(state, 3))
    loaded = load(tmp_path, parts_kit.blank(parts_kit.layout(state, 1)[0]))["p/m"]
    as_saved = torch.cat([parts_kit.values_of(parts["p/m"]) for parts in parts_kit.layout(state, 3)])
    assert parts_kit.same_bits(loaded, parts_kit.Whole(as_saved, "signed", True).part(0, 9 * BLOCK + 17))


def test_live_tensors_may_be_views_with_any_strides(tmp_path):
    first, second = torch.randn(6, 4), torch.zeros(6, 4)
    save(tmp_path, [{"p/master": StatePart(first.t(), torch.Size((4, 6)), 0, 6)}])
    load(tmp_path, {"p/master": StatePart(second.t(), torch.Size((4, 6)), 0, 6)})
    assert torch.equal(first, second)


def test_nan_and_infinity_come_back_as_they_were(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    save(tmp_path, [{"p/m": StatePart(values, values.shape, 0, 4)}])
    part = load(tmp_path, {"p/m": StatePart(torch.zeros(4), values.shape, 0, 4)})["p/m"]
    assert torch.equal(part.values.view(torch.int32), values.view(torch.int32))


def test_what_all_ranks_hold_is_written_once_and_shared_out(parts_kit):
    state = {f"p{i}/m": parts_kit.Whole.random((64,), torch.float32, cut=False) for i in range(8)}
    layouts = parts_kit.layout(state, 4)
    written = [parts_to_write(parts, OneOf(rank, layouts)) for rank, parts in enumerate(layouts)]
    assert sorted(name for parts in written for name in parts) == sorted(state)
    assert [len(parts) for parts in written] == [2, 2, 2, 2]
    busy = [parts_to_write(parts, OneOf(rank, layouts), busy_bytes=10**9) for rank, parts in enumerate(layouts)]
    assert len(busy[0]) == 0


def test_what_one_rank_holds_whole_because_it_is_small_is_not_lost(tmp_path, parts_kit):
    state = {f"p{i}/m": parts_kit.Whole.random((1,), torch.float32, cut=True) for i in range(3)}
    save(tmp_path, parts_kit.layout(state, 3), busy_bytes=10**9)
    loaded = load(tmp_path, parts_kit.blank(parts_kit.layout(state, 1)[0]))
    assert all(torch.equal(loaded[name].values, state[name].values) for name in state)


def test_a_file_says_where_its_parts_belong_to_anyone_who_reads_safetensors(tmp_path, parts_kit, small):
    save(tmp_path, parts_kit.layout(small, 2))
    with safe_open(tmp_path / "optimizer-00001-of-00002.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert torch.equal(file.get_tensor("embed/exp_avg"), small["embed/exp_avg"].values[500:])
        assert file.get_tensor("up/exp_avg/scale").shape == (1,)
    described = json.loads(metadata.pop("parts"))
    assert metadata == {"format": "ngpt optimizer state", "version": "1", "step": "5", "rank": "1", "ranks": "2"}
    assert described["embed/exp_avg"] == {"shape": [1000], "start": 500, "count": 500, "encoding": "plain"}
    assert described["up/exp_avg"] == {"shape": [4, 30], "start": 15, "count": 15, "encoding": "8-bit signed"}
    assert described["up/exp_avg_sq"]["encoding"] == "8-bit unsigned"


# ------------------------------------------------------------------------------------------------------------- what does not fit
def change(parts, name, **changes):
    part = parts[name]
    fields = {key: getattr(part, key) for key in ("values", "shape", "start", "count", "scales", "signed")}
    return parts | {name: StatePart(**(fields | changes))}


def longer(parts, name):
    part = parts[name]
    shape = torch.Size((*part.shape[:-1], part.shape[-1] + 1))
    return change(parts, name, values=torch.zeros(shape, dtype=part.values.dtype), shape=shape, count=shape[-1])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda parts: longer(parts, "embed/exp_avg"), r"embed: the saved exp_avg is torch.float32 \(1000,\), .* torch.float32 \(1001,\)"),
        (lambda parts: longer(parts, "up/basis"), r"up: the saved basis is torch.bfloat16 \(8, 4\), .* torch.bfloat16 \(8, 5\)"),
        (
            lambda parts: change(parts, "up/gram", values=torch.zeros(3, 3)),
            r"up: the saved gram is torch.float64 \(3, 3\), this optimizer keeps torch.float32 \(3, 3\)",
        ),
        (
            lambda parts: change(parts, "up/exp_avg", values=torch.zeros(4, 30), scales=None),
            r"up: the saved exp_avg is 8-bit signed \(4, 30\), this optimizer keeps torch.float32 \(4, 30\)",
        ),
        (lambda parts: change(parts, "up/exp_avg", signed=False), r"exp_avg is 8-bit signed .* keeps 8-bit unsigned"),
        (
            lambda parts: {name: part for name, part in parts.items() if name != "up/history"},
            r"up: the saved state has \['basis', .*'history', 'step'\], this optimizer keeps \['basis', .*'gram', 'step'\]",
        ),
        (
            lambda parts: parts | {"up/master": StatePart(torch.zeros(2), torch.Size((2,)), 0, 2)},
            r"up: the saved state has \[.*'history', 'step'\], this optimizer keeps \[.*'history', 'master', 'step'\]",
        ),
        (
            lambda parts: {name: part for name, part in parts.items() if not name.startswith("embed")},
            r"embed: there is saved state of it, but it is no parameter of this optimizer",
        ),
        (
            lambda parts: parts | {"new/step": StatePart(torch.tensor(0), torch.Size(), 0, 0)},
            r"new: the saved state has \[\], this optimizer keeps \['step'\]",
        ),
    ],
)
def test_state_of_another_optimizer_is_named_and_changes_nothing(tmp_path, parts_kit, small, other, named):
    save(tmp_path, parts_kit.layout(small, 2))
    own = other(parts_kit.blank(parts_kit.layout(small, 1)[0]))
    before = {name: part.values.clone() for name, part in own.items()}
    with pytest.raises(CheckpointError, match=named) as error:
        load(tmp_path, own)
    assert "another optimizer or with other settings (rank, history, precision, ...)" in str(error.value)
    assert all(torch.equal(part.values, before[name]) for name, part in own.items())


def test_many_problems_are_not_a_wall_of_text(tmp_path, parts_kit):
    state = {f"p{i}/m": parts_kit.Whole.random((4,), torch.float32, cut=True) for i in range(50)}
    save(tmp_path, parts_kit.layout(state, 1))
    with pytest.raises(CheckpointError, match="and 45 more") as error:
        load(tmp_path, {name: longer(parts_kit.layout({name: whole}, 1)[0], name)[name] for name, whole in state.items()})
    assert len(str(error.value).splitlines()) == 7


def broken(change_folder, named):
    return pytest.param(change_folder, named, id=named)


def rewrite(path, *, metadata=None, parts=None, drop=()):
    """Write a file anew with changes to what its header says, or without some tensors."""
    file = TensorFile(path)
    tensors = {name: file.read(name).clone() for name in file.names if name not in drop}
    described = json.loads(file.metadata["parts"])
    for name, changes in (parts or {}).items():
        described[name] = described.get(name, {}) | changes
    new = file.metadata | {"parts": json.dumps(described)} | (metadata or {})
    write_tensors(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, tensors.items(), new)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        broken(lambda f: (f / file_name(1, 3)).unlink(), "optimizer-00001-of-00003.safetensors: no such file"),
        broken(lambda f: [(f / file_name(rank, 3)).unlink() for rank in (0, 2)], r"optimizer-00000-of-00003.*\(and 1 more"),
        broken(lambda f: [(f / file_name(rank, 3)).unlink() for rank in range(3)], "has no optimizer state"),
        broken(lambda f: truncate(f / file_name(2, 3)), "optimizer-00002-of-00003.safetensors cannot be read"),
        broken(lambda f: shutil.copy(f / file_name(0, 3), f / file_name(0, 2)), "files of several saves: optimizer-00000-of-00002"),
        broken(lambda f: shutil.copy(f / file_name(0, 3), f / file_name(1, 3)), "optimizer-00001-of-00003.* is not what its name says"),
        broken(lambda f: rewrite(f / file_name(2, 3), metadata={"step": "4"}), "optimizer-00002-of-00003.* is of step 4, but .* step 5"),
        broken(lambda f: rewrite(f / file_name(2, 3), metadata={"version": "2"}), "'version': '2'"),
        broken(lambda f: rewrite(f / file_name(1, 3), metadata={"parts": "[1"}), "00001-of-00003.* does not describe optimizer state"),
        broken(lambda f: rewrite(f / file_name(1, 3), metadata={"parts": "[1]"}), "00001-of-00003.* does not describe optimizer state"),
        broken(lambda f: rewrite(f / file_name(1, 3), parts={"embed/exp_avg": {"start": -1}}), "does not describe optimizer state"),
        broken(lambda f: rewrite(f / file_name(1, 3), parts={"embed/exp_avg": {"start": 990}}), "does not describe .*embed/exp_avg"),
        broken(lambda f: rewrite(f / file_name(1, 3), parts={"embed/exp_avg": {"encoding": "zip"}}), "does not describe .*embed/exp"),
        broken(lambda f: rewrite(f / file_name(1, 3), parts={"embed/exp_avg": {"count": 9}}), "embed/exp_avg is not .*as its header says"),
        broken(lambda f: rewrite(f / file_name(1, 3), drop=["up/exp_avg/scale"]), "00001-of-00003.* has no readable up/exp_avg/scale"),
        broken(lambda f: rewrite(f / file_name(1, 3), drop=["embed/exp_avg"]), "00001-of-00003.* has no readable embed/exp_avg"),
        broken(lambda f: rewrite(f / file_name(1, 3), parts={"embed/exp_avg": {"start": 340}}), "embed/exp_avg: nothing .* from 334 on"),
    ],
)
def test_files_that_are_missing_broken_or_of_another_save_are_named_and_change_nothing(tmp_path, parts_kit, small, spoil, named):
    save(tmp_path, parts_kit.layout(small, 3))
    spoil(tmp_path)
    own = parts_kit.blank(parts_kit.layout(small, 1)[0])
    before = {name: part.values.clone() for name, part in own.items()}
    with pytest.raises(CheckpointError, match=named):
        load(tmp_path, own)
    assert all(torch.equal(part.values, before[name]) for name, part in own.items())


def test_a_rank_reads_no_more_than_its_own_columns(tmp_path, parts_kit, monkeypatch):
    state = {"p/m": parts_kit.Whole.random((4, 120), torch.float32, cut=True)}
    save(tmp_path, parts_kit.layout(state, 3))
    read = []
    for name in ("read", "read_columns"):
        original = getattr(TensorFile, name)
        monkeypatch.setattr(TensorFile, name, lambda *args, original=original: read.append(original(*args)) or read[-1])
    for rank, parts in enumerate(parts_kit.layout(state, 4)):
        read.clear()
        load(tmp_path, parts_kit.blank(parts))
        assert sum(tensor.numel() for tensor in read) == 4 * 30, rank
