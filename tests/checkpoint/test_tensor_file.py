"""The streaming writer makes files that safetensors reads, and nothing but what was announced gets into them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from ngpt.checkpoint.tensor_file import CheckpointError, TensorFile, record_of, write_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def layout_of(tensors):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def some_tensors():
    return {
        "odd": torch.arange(7, dtype=torch.uint8),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "w": torch.randn(4, 3, dtype=torch.bfloat16).t(),  # not contiguous
        "step": torch.tensor(5),
        "none": torch.empty(0, 3),
    }


def equal(first, second):
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


@given(st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(st.sampled_from(DTYPES), shapes), max_size=6), st.randoms())
def test_safetensors_reads_what_was_written_in_any_order(tmp_path_factory, kinds, random):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {name: torch.randint(0, 99, shape).to(dtype) for name, (dtype, shape) in kinds.items() if name != "__metadata__"}
    shuffled = random.sample(sorted(tensors.items(), key=lambda item: item[0]), len(tensors))
    write_tensors(path, layout_of(tensors), shuffled, {"who": "we"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(equal(read[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"who": "we"}
    ours = TensorFile(path)
    assert set(ours.names) == tensors.keys()
    assert all(equal(ours.read(name), tensors[name]) for name in tensors)
    assert {name: (ours.dtype(name), ours.shape(name)) for name in ours.names} == layout_of(tensors)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_the_hash_is_that_of_the_file_in_whatever_order_it_was_written(tmp_path, order):
    tensors = {str(number): torch.randn(10 * number) for number in range(6)}
    path = tmp_path / "x.safetensors"
    assert write_tensors(path, layout_of(tensors), list(tensors.items())[::order]) == record_of(path)


def test_a_tensor_may_change_as_soon_as_the_next_one_is_asked_for(tmp_path):
    buffer, path = torch.empty(1 << 20), tmp_path / "x.safetensors"

    def one_buffer():
        for number in range(4):
            yield str(number), buffer.fill_(number)
            buffer.fill_(-1)

    written = write_tensors(path, {str(number): (buffer.dtype, buffer.shape) for number in range(4)}, one_buffer())
    assert written == record_of(path)
    assert all(torch.equal(value, torch.full_like(value, int(name))) for name, value in load_file(path).items())


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = some_tensors()
    write_tensors(path, layout_of(tensors), tensors.items())
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert size % 8 == 0
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert all(header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0 for name, tensor in tensors.items())


def test_one_tensor_at_a_time_is_alive(tmp_path):
    alive, most = set(), 0

    class Watched:
        def __init__(self, number):
            self.number = number
            alive.add(number)

        def __del__(self):
            alive.discard(self.number)

    def stream():
        nonlocal most
        for number in range(5):
            tensor = torch.full((3,), float(number))
            tensor.watched = Watched(number)
            most = max(most, len(alive))
            yield str(number), tensor
            del tensor

    write_tensors(tmp_path / "x", {str(number): (torch.float32, torch.Size([3])) for number in range(5)}, stream())
    assert most == 1
    assert load_file(tmp_path / "x")["4"].tolist() == [4.0] * 3


@pytest.mark.parametrize(
    ("given_tensors", "named"),
    [
        ({"a": torch.zeros(2)}, "never given: b"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, r"b is torch\.float32 \(3,\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}, r"b is torch\.float64"),
        ({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}, "c is"),
    ],
)
def test_what_was_not_announced_is_refused(tmp_path, given_tensors, named):
    announced = {"a": (torch.float32, torch.Size([2])), "b": (torch.float32, torch.Size([2]))}
    with pytest.raises(ValueError, match=named):
        write_tensors(tmp_path / "x", announced, given_tensors.items())


def test_ranges_of_the_last_axis_are_read(tmp_path):
    tensors = {"cube": torch.randn(2, 3, 9), "flat": torch.arange(9, dtype=torch.uint8), "other": torch.randn(4, 4)}
    write_tensors(tmp_path / "x", layout_of(tensors), tensors.items())
    file = TensorFile(tmp_path / "x")
    assert torch.equal(file.read_columns("cube", 2, 7), tensors["cube"][..., 2:7])
    assert torch.equal(file.read_columns("flat", 0, 1), tensors["flat"][:1])


def test_a_truncated_file_is_named_wherever_it_ends(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path / "whole", layout_of(tensors), tensors.items())
    content = (tmp_path / "whole").read_bytes()
    for length in [0, 1, 8, 9, len(content) // 2, len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut cannot be read"):
            TensorFile(tmp_path / "cut")


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere cannot be read"):
        TensorFile(tmp_path / "nowhere")
    write_tensors(tmp_path / "x", {}, [])
    with pytest.raises(CheckpointError, match="w"):
        TensorFile(tmp_path / "x").read("w")
