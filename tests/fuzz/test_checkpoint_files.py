"""The files of a checkpoint, given anything: what was saved, or a CheckpointError that names the file."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpt.checkpoint.integrity import COMPLETE, MANIFEST
from ngpt.checkpoint.store import CheckpointStore
from ngpt.checkpoint.tensor_file import CheckpointError, TensorFile, write_tensors
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart

FACTOR = int(os.environ.get("NGPT_FUZZ", "1"))
TENSORS = {
    "a": torch.ones(3, 5),
    "b": torch.arange(4),
    "c": torch.tensor(2.0),
    "e": torch.zeros(0, 3),
    "h": torch.ones(7, dtype=torch.bfloat16),
}
NUMBERS = [0, -1, 1, 2**31, 2**62, 2**63, 2**64, 1e30, None, True]
JUNK = st.sampled_from([*NUMBERS, "", "x", "\ud800", [], {}, [1], [-1], [0, 2**63], [2**32, 2**32], "F4", "F64", "BOOL"])
NAMES = st.sampled_from([*TENSORS, "__metadata__", "new"])
KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "more", None])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, its shape and dtype as announced."""
    file, found = TensorFile(path), {}
    for name in file.names:
        shape, dtype = file.shape(name), file.dtype(name)
        found[name] = file.read(name)
        assert (found[name].shape, found[name].dtype) == (shape, dtype)
        if shape:
            assert file.read_columns(name, 0, min(2, shape[-1])).shape == (*shape[:-1], min(2, shape[-1]))
    assert all(isinstance(value, str) for value in file.metadata.values())
    return found


def drop(_: object) -> None:
    """What an engine would make of the weights does not matter here."""


def write(path: Path) -> bytes:
    write_tensors(path, {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}, TENSORS.items(), {"x": "y"})
    return path.read_bytes()


def expect_ours(action: Callable[[], Any]) -> None:
    """The action succeeds or raises CheckpointError; anything else fails the test."""
    try:
        action()
    except CheckpointError as error:
        assert str(error)  # noqa: PT017 (both ends are right)


def test_any_damage_to_a_tensor_file_gives_tensors_as_announced_or_an_error_of_ours(
    tmp_path: Path, damaged: Callable[..., Iterator[bytes]]
) -> None:
    """Seeded damage to a tensor file | tensors as announced, or an error of ours"""
    for data in damaged(write(tmp_path / "a.safetensors"), 800):
        path = tmp_path / "a.safetensors"
        path.write_bytes(data)
        expect_ours(lambda path=path: read_all(path))


@settings(max_examples=300 * FACTOR, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, key=KEYS, value=JUNK)
def test_a_tensor_file_whose_header_says_anything_gives_tensors_as_announced_or_an_error_of_ours(
    tmp_path: Path, name: str, key: str | None, value: Any
) -> None:
    """Any value in the header of a tensor file | tensors as announced, or an error of ours"""
    path = tmp_path / "a.safetensors"
    content = write(path)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if key is None:
        header[name] = value
    else:
        header.setdefault(name, {})[key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    expect_ours(lambda: read_all(path))


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    """A header that claims to be huge | refused"""
    for length in (2**63, 2**40, 10**8 + 1, 100):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{" * 50)
        with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
            TensorFile(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------------ whole checkpoints
def parts() -> dict[str, StatePart]:
    return {f"w/{name}": StatePart(torch.zeros(2, 3), torch.Size((2, 3)), 0, 3) for name in ("exp_avg", "exp_avg_sq")}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """With good checkpoints of steps 1 and 2."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=5, collectives=Collectives())
    for step in (1, 2):
        weights = {"w": torch.full((2, 3), float(step))}
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
        random = {"torch": torch.arange(5, dtype=torch.uint8)}
        store.save(step, weights=iter(weights.items()), layout=layout, optimizer=parts(), random=random, state={"progress": {"step": step}})
    return store


def test_any_damage_to_any_file_of_a_checkpoint_is_noticed_and_the_one_before_is_taken(
    store: CheckpointStore, damaged: Callable[..., Iterator[bytes]]
) -> None:
    """Seeded damage to every file of a checkpoint | noticed; the one before is taken"""
    older, newer = sorted(store.folder.glob("step-*"))
    for path in sorted(newer.iterdir()):
        whole = path.read_bytes()
        for data in damaged(whole, 25):
            if data == whole:
                continue
            path.write_bytes(data)
            assert store.newest_good() == older, f"{path.name}: {data[:80]!r}"
            with pytest.raises(CheckpointError):
                store.open(newer)
        path.write_bytes(whole)
    assert store.newest_good() == newer


def test_a_checkpoint_that_vouches_for_nonsense_gives_values_or_an_error_of_ours(
    store: CheckpointStore, damaged: Callable[..., Iterator[bytes]]
) -> None:
    """Nonsense with a right checksum | values, or an error of ours

    As one that somebody else has made, or one from before there were manifests: no checksum stands before the readers.
    """
    folder = store.folder / "step-0000002"
    (folder / MANIFEST).unlink()
    (folder / COMPLETE).write_bytes(b"")
    readers: dict[str, Callable[[], Any]] = {
        "state.json": lambda: store.read_state(folder),
        "model.safetensors": lambda: store.read_weights(folder, lambda file: drop(read_all(file.path))),
        "optimizer-00000-of-00001.safetensors": lambda: store.read_optimizer(folder, parts()),
        "random.safetensors": lambda: store.read_random(folder),
    }
    for name, reader in readers.items():
        whole = (folder / name).read_bytes()
        for data in [b"", b"[" * 10**5, *damaged(whole, 150)]:
            (folder / name).write_bytes(data)
            expect_ours(reader)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            reader()
        (folder / name).mkdir()
        with pytest.raises(CheckpointError, match=name):
            reader()
        shutil.rmtree(folder / name)
        (folder / name).write_bytes(whole)


def test_generators_of_any_shape_are_refused_or_read(store: CheckpointStore) -> None:
    """Generators of any shape | refused or read"""
    folder = store.folder / "step-0000002"
    for tensor in (torch.tensor(3), torch.zeros(0, 5), torch.zeros(2, 0)):
        write_tensors(folder / "random.safetensors", {"torch": (tensor.dtype, tensor.shape)}, [("torch", tensor)])
        expect_ours(lambda: store.read_random(folder))
