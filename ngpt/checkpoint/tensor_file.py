"""Safetensors files written one tensor at a time, and read a tensor or a part of one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

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


class CheckpointError(ValueError):
    """A checkpoint is missing, unfinished, unreadable, or not one of this run."""


def write_tensors(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and force it to disk, holding one of `tensors` at a time; they may come in any order.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: `tensors` are not those of `layout`.
    """
    head, starts = _head(layout, metadata or {})
    missing = dict(layout)
    with path.open("wb") as file:
        file.write(head)
        for name, tensor in tensors:
            expected = missing.pop(name, None)
            if expected != (tensor.dtype, tensor.shape):
                raise ValueError(f"{path.name}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but {expected} was announced")
            file.seek(len(head) + starts[name])
            file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
            del tensor  # before the next one is made
        if missing:
            raise ValueError(f"{path.name}: announced, but never given: {', '.join(missing)}")
        file.flush()
        os.fsync(file.fileno())


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
        except (OSError, SafetensorError) as error:
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
