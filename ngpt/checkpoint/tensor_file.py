"""Safetensors files written one tensor at a time, and read a tensor or a part of one at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, torch.Size]]  # dtype and shape of each tensor by name: what the head of a file needs in advance

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes: that of the widest dtype
READ_AT_ONCE = 1 << 20  # bytes


class CheckpointError(ValueError):
    """A checkpoint is missing, unfinished, unreadable, or not one of this run."""


class NotFinite(CheckpointError):
    """Weights, or masters of them, have NaN or infinity in them, which no checkpoint shall keep."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256, in hexadecimal digits, of a file as it was written."""

    size: int
    sha256: str


def write_tensors(
    path: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    must_be_finite: Callable[[str], bool] = lambda name: False,
) -> FileRecord:
    """Write a safetensors file and force it to disk, holding one of `tensors` at a time; they may come in any order.

    What comes in the order of the file, which is that of `layout` but for wider dtypes first, is hashed on its way; the rest is read back.

    Returns:
        What was written.

    Raises:
        NotFinite: a tensor that `must_be_finite` has NaN or infinity in it.
        OSError: the disk is full or not writable.
        ValueError: `tensors` are not those of `layout`.
    """
    head, starts = _head(layout, metadata or {})
    missing = dict(layout)
    with path.open("w+b") as file:
        file.write(head)
        digest, hashed = hashlib.sha256(head), len(head)
        for name, tensor in tensors:
            expected = missing.pop(name, None)
            if expected != (tensor.dtype, tensor.shape):
                raise ValueError(f"{path.name}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but {expected} was announced")
            on_cpu = tensor.detach().cpu()
            if must_be_finite(name) and not is_finite(on_cpu):
                raise NotFinite(f"{name} has NaN or infinity in it, and weights that are not finite are not saved")
            content = on_cpu.reshape(-1).view(torch.uint8).numpy()
            start = len(head) + starts[name]
            file.seek(start)
            file.write(content)
            if start == hashed:
                digest.update(content)
                hashed += content.nbytes
            del tensor, on_cpu, content  # before the next one is made
        if missing:
            raise ValueError(f"{path.name}: announced, but never given: {', '.join(missing)}")
        file.flush()
        file.seek(hashed)
        size = hashed + _hash_rest(file, digest)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def record_of(path: Path) -> FileRecord:
    """Size and SHA-256 of a file that is there. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = _hash_rest(file, digest)
    return FileRecord(size, digest.hexdigest())


def _hash_rest(file: Any, digest: Any) -> int:
    """Add the rest of an open file to a hash. Returns its length."""
    buffer, size = memoryview(bytearray(READ_AT_ONCE)), 0
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
        size += count
    return size


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in a tensor; what is no floating-point number is always finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor))  # an order faster than isfinite; a NaN becomes both bounds


def _head(layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data (the length of the header, and the header), and where each tensor starts in the data."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):  # so that every tensor is aligned
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, starts


class TensorFile:
    """A safetensors file to read from. Bytes are read when they are asked for: opening reads the header alone.

    Raises:
        CheckpointError: here and in all methods, naming the file, where it is missing, truncated or not what it should be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.names: list[str] = list(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        return torch.Size(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        kind = self._slice(name).get_dtype()
        if kind not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is of type {kind}; known are {', '.join(DTYPES)}")
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        try:
            return self._file.get_tensor(name)
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: an axis longer than torch can count
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """[start, stop) of the last axis of a tensor of at least one axis, on the CPU."""
        try:
            return self._slice(name)[..., start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error

    def _slice(self, name: str):
        try:
            return self._file.get_slice(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} has no readable {name}: {error}") from error
