"""What one rank writes into a checkpoint: weights, its optimizer state, generators, the rest; live, or as a copy that nothing changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as tensors_of
from torch import Tensor

from ngpt.checkpoint.integrity import write_durably
from ngpt.checkpoint.optimizer_files import bytes_to_write, file_name, write_optimizer
from ngpt.checkpoint.tensor_file import FileRecord, Layout, write_tensors
from ngpt.optim.state import StatePart

WEIGHTS = "model.safetensors"
RANDOM = "random.safetensors"
ROOM_FOR_HEADERS = 1 << 20  # bytes, and beside them a hundredth


@dataclass(frozen=True)
class Contents:
    """All files of one rank.

    Args:
        run: identifier of the run.
        weights: names and whole tensors, one at a time; the only thing here that may be iterated just once. Only rank 0 writes them.
        layout: their dtypes and shapes.
        optimizer: the parts of the optimizer state that this rank writes.
        generators: of each rank, the states of its generators as a safetensors file. Only rank 0 writes them.
        files: name -> content of all other files. Only rank 0 writes them.
    """

    run: str
    step: int
    rank: int
    ranks: int
    weights: Iterable[tuple[str, Tensor]]
    layout: Layout
    optimizer: Mapping[str, StatePart]
    generators: Sequence[bytes]
    files: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, headers guessed generously."""
        size = bytes_to_write(self.optimizer)
        if self.rank == 0:
            size += bytes_of_layout(self.layout) + sum(map(len, self.generators)) + sum(map(len, self.files.values()))
        return size + size // 100 + ROOM_FOR_HEADERS

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write the files and force them to disk; a tensor at a time is copied to the CPU. Returns what was written, by name.

        Raises:
            NotFinite: NaN or infinity in weights or masters of them.
            OSError: the disk is full or not writable.
        """
        origin = {"run": self.run, "step": str(self.step)}
        records = {}
        if self.rank == 0:
            head = {"format": "pt", **origin}  # the format is what Hugging Face's reader asks for
            records[WEIGHTS] = write_tensors(folder / WEIGHTS, self.layout, self.weights, head, must_be_finite=lambda name: True)
            records[RANDOM] = self._write_generators(folder / RANDOM, origin)
            records |= {name: write_durably(folder / name, content) for name, content in self.files.items()}
        name = file_name(self.rank, self.ranks)
        records[name] = write_optimizer(folder, self.optimizer, rank=self.rank, ranks=self.ranks, step=self.step, metadata=origin)
        return records

    def copied(self) -> Contents:
        """The same, whatever happens to the live tensors from now on, in the CPU's memory: on rank 0 as much as weights and its state."""
        weights = [(name, _copy(tensor)) for name, tensor in self.weights] if self.rank == 0 else []
        optimizer = {
            name: dataclasses.replace(part, values=_copy(part.values), scales=None if part.scales is None else _copy(part.scales))
            for name, part in self.optimizer.items()
        }
        return dataclasses.replace(self, weights=weights, optimizer=optimizer)

    def _write_generators(self, path: Path, origin: Mapping[str, str]) -> FileRecord:
        by_rank = [tensors_of(data) for data in self.generators]
        rows = {name: torch.stack([tensors[name] for tensors in by_rank]) for name in by_rank[0]}
        return write_tensors(path, {name: (states.dtype, states.shape) for name, states in rows.items()}, rows.items(), origin)


def bytes_of_layout(layout: Layout) -> int:
    """Bytes of the tensors of a layout."""
    return sum(shape.numel() * dtype.itemsize for dtype, shape in layout.values())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
