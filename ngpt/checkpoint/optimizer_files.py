"""Optimizer state on disk: a safetensors file per rank, each part with its place in the whole, so that any layout loads any other.

Tensors are called "parameter name/state key". A header's metadata holds, as JSON under `parts`, of each tensor the shape of the whole,
`start` and `count` (the part is [start, start + count) of the whole's last axis) and `encoding`: "plain", or "8-bit signed" and "8-bit
unsigned" (`ngpt.optim.quantization`), where the tensor holds the codes of the part's elements in row-major order and ".../scale" one
number for each of their blocks. Every rank reads, from whichever files have them, the ranges that it holds itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ngpt.checkpoint.agreement import Agreement
from ngpt.checkpoint.tensor_file import CheckpointError, FileRecord, TensorFile, write_tensors
from ngpt.optim.quantization import BLOCK, code_shapes, dequantize, quantize_
from ngpt.optim.state import StatePart

FORMAT, VERSION = "ngpt optimizer state", "1"
PLAIN, SIGNED, UNSIGNED = "plain", "8-bit signed", "8-bit unsigned"
SCALE = "/scale"
MASTER = "/master"
REQUANTIZED_AT_ONCE = BLOCK << 14  # values (4 M) of a long vector that are held in fp32 on their way from 8 bits to 8 bits
PROBLEMS_SHOWN = 5
_NAME = re.compile(r"optimizer-(\d{5,})-of-(\d{5,})\.safetensors")


def file_name(rank: int, ranks: int) -> str:
    """Name of the file of one rank."""
    return f"optimizer-{rank:05d}-of-{ranks:05d}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------- saving
def parts_to_write(parts: Mapping[str, StatePart], ranks: Agreement, *, busy_bytes: int = 0) -> dict[str, StatePart]:
    """The parts that this rank is to write: its own, and its share of those that all ranks hold whole. A collective call.

    Args:
        busy_bytes: what rank 0 writes beside its parts, so that it is given less of the shared ones.
    """
    names = sorted(parts)
    everywhere = [all(flags) for flags in zip(*ranks.gather(bytes(parts[name].is_whole for name in names)), strict=True)]
    loads = [busy_bytes] + [0] * (ranks.size - 1)
    own = {}
    for name, shared in zip(names, everywhere, strict=True):
        part = parts[name]
        writer = loads.index(min(loads)) if shared else ranks.rank
        if shared:
            loads[writer] += part.values.nbytes
        if writer == ranks.rank:
            own[name] = part
    return own


def write_optimizer(
    folder: Path, parts: Mapping[str, StatePart], *, rank: int, ranks: int, step: int, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write the file of one rank, holding a copy of one tensor at a time.

    Raises:
        NotFinite: a master weight has NaN or infinity in it.
        OSError: the disk is full or not writable.
    """
    described = {}
    for name, part in parts.items():
        start, count = _columns(part)
        described[name] = {"shape": list(part.shape), "start": start, "count": count, "encoding": _encoding(part)}
    head = {"format": FORMAT, "version": VERSION, "step": str(step), "rank": str(rank), "ranks": str(ranks), **(metadata or {})}
    head["parts"] = json.dumps(described, separators=(",", ":"))
    tensors = sorted(_tensors(parts), key=lambda item: -item[1].dtype.itemsize)  # the order of the file, so that it is hashed on its way
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors}
    return write_tensors(folder / file_name(rank, ranks), layout, tensors, head, must_be_finite=lambda name: name.endswith(MASTER))


def bytes_to_write(parts: Mapping[str, StatePart]) -> int:
    """Bytes of the tensors in the file of these parts."""
    return sum(tensor.nbytes for _, tensor in _tensors(parts))


def _tensors(parts: Mapping[str, StatePart]) -> Iterator[tuple[str, Tensor]]:
    for name, part in parts.items():
        if part.scales is None:
            yield name, part.values
        else:  # what allocation has added to make blocks whole is left out
            codes, scales = code_shapes(_local_shape(part.shape, part.count).numel())
            yield name, part.values.view(-1)[:codes]
            yield name + SCALE, part.scales.view(-1)[:scales]


# --------------------------------------------------------------------------------------------------------------------- loading
def find_fitting(folder: Path, parts: Mapping[str, StatePart]) -> dict[str, list[SavedPart]]:
    """The saved parts of every state tensor, after a look at all headers and before any change.

    Raises:
        CheckpointError: a file is missing, truncated or of another save, or the state is not all that `parts` need: named.
    """
    saved = _saved_parts(folder)
    _check_fit(folder, saved, parts)
    return saved


def fill_(parts: Mapping[str, StatePart], saved: Mapping[str, Sequence[SavedPart]]) -> None:
    """Fill the live tensors of `parts`, whatever layout wrote what is saved.

    Bits are kept, but for 8-bit state whose part has another range now: its blocks are others, and values go to their nearest levels.
    """
    with torch.no_grad():
        for name, part in parts.items():
            _fill(part, saved[name])


@dataclass(frozen=True)
class SavedPart:
    """A part of one state tensor, in one file."""

    file: TensorFile
    name: str
    shape: torch.Size
    start: int
    count: int
    encoding: str

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def kind(self) -> str:
        return str(self.file.dtype(self.name)) if self.encoding == PLAIN else self.encoding

    def check(self) -> None:
        """Raises CheckpointError if the file's tensors are not what a part with this description has."""
        local = _local_shape(self.shape, self.count)
        codes, scales = code_shapes(local.numel())
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {self.name: (self.file.dtype(self.name), local)}
        if self.encoding != PLAIN:
            expected = {self.name: (torch.uint8, (codes,)), self.name + SCALE: (torch.float32, (scales,))}
        for name, (dtype, shape) in expected.items():
            if (self.file.dtype(name), tuple(self.file.shape(name))) != (dtype, tuple(shape)):
                raise CheckpointError(f"{self.file.path}: {name} is not {dtype} {tuple(shape)}, as its header says of it")

    def read(self, low: int, high: int) -> Tensor:
        """[low, high) of the whole's last axis, of a plain part."""
        if not self.shape or (low, high) == (self.start, self.stop):
            return self.file.read(self.name)
        return self.file.read_columns(self.name, low - self.start, high - self.start)

    def dequantize(self, low: int, high: int) -> Tensor:
        """[low, high) of the whole's last axis of an 8-bit part, as fp32 (rows, high - low)."""
        rows, first, last = math.prod(self.shape[:-1]), low - self.start, high - self.start
        if rows > 1:  # a range of columns is in nearly all blocks
            codes, scales = self.file.read(self.name), self.file.read(self.name + SCALE)
            return dequantize(codes, scales, signed=self.encoding == SIGNED).view(rows, self.count)[:, first:last]
        block = first // BLOCK
        codes = self.file.read_columns(self.name, block * BLOCK, last)
        scales = self.file.read_columns(self.name + SCALE, block, -(-last // BLOCK))
        return dequantize(codes, scales, signed=self.encoding == SIGNED)[None, first - block * BLOCK :]


def _saved_parts(folder: Path) -> dict[str, list[SavedPart]]:
    """The parts of each state tensor, by their start, from the headers of all files."""
    saved: dict[str, list[SavedPart]] = {}
    steps: list[str | None] = []
    paths = _files(folder)
    for rank, path in enumerate(paths):
        file = TensorFile(path)
        origin = {"format": FORMAT, "version": VERSION, "rank": str(rank), "ranks": str(len(paths))}
        wrong = {key: file.metadata.get(key) for key, value in origin.items() if file.metadata.get(key) != value}
        if wrong:
            right = {key: origin[key] for key in wrong}
            raise CheckpointError(f"{path} is not what its name says: its header has {wrong} in place of {right}")
        steps.append(file.metadata.get("step"))
        if steps[-1] != steps[0]:
            raise CheckpointError(f"{path} is of step {steps[-1]}, but {paths[0].name} beside it is of step {steps[0]}")
        for part in _described_parts(file):
            part.check()
            saved.setdefault(part.name, []).append(part)
    for pieces in saved.values():
        pieces.sort(key=lambda part: part.start)
    return saved


def _files(folder: Path) -> list[Path]:
    """The files of all ranks, in order. Raises CheckpointError naming those that are missing, or that belong to another save."""
    found = {path.name: match for path in folder.glob("optimizer-*") if (match := _NAME.fullmatch(path.name))}
    sizes = {int(match[2]) for match in found.values()}
    if not sizes:
        raise CheckpointError(f"{folder} has no optimizer state (no {file_name(0, 1)}, or one of another number of ranks)")
    if len(sizes) > 1:
        raise CheckpointError(f"{folder} has files of several saves: {', '.join(sorted(found))}; remove those that do not belong there")
    ranks = sizes.pop()
    missing = [rank for rank in range(ranks) if file_name(rank, ranks) not in found] if len(found) != ranks else []
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder / file_name(missing[0], ranks)}: no such file, but it has a part of the optimizer state{more}")
    return [folder / file_name(rank, ranks) for rank in range(ranks)]


def _described_parts(file: TensorFile) -> Iterator[SavedPart]:
    """What a header says of its parts. Raises CheckpointError where that makes no sense."""
    try:
        for name, entry in json.loads(file.metadata["parts"]).items():
            shape, start, count, encoding = (entry[key] for key in ("shape", "start", "count", "encoding"))
            numbers = [*shape, start, count]
            length = shape[-1] if shape else 1
            if not all(type(number) is int and number >= 0 for number in numbers) or start + count > length:
                raise ValueError(f"{name}: {entry}")
            if encoding not in (PLAIN, SIGNED, UNSIGNED) or (encoding != PLAIN and not shape):
                raise ValueError(f"{name}: {entry}")
            yield SavedPart(file, name, torch.Size(shape), start, count, encoding)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file.path}: its header does not describe optimizer state: {error}") from error


# -------------------------------------------------------------------------------------------------------------------- checking
def _check_fit(folder: Path, saved: Mapping[str, list[SavedPart]], parts: Mapping[str, StatePart]) -> None:
    """Raises CheckpointError, naming the first few problems, unless the saved parts are all that `parts` need and nothing else."""
    problems = [*_key_problems(saved, parts), *_kind_problems(saved, parts)]
    if problems:
        shown = problems[:PROBLEMS_SHOWN] + ([f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else [])
        raise CheckpointError(
            f"the optimizer state in {folder} does not fit: it was saved by another optimizer or with other settings "
            "(rank, history, precision, ...)\n  " + "\n  ".join(shown)
        )
    for name, part in parts.items():
        _covering(saved[name], *_columns(part))


def _key_problems(saved: Mapping[str, list[SavedPart]], parts: Mapping[str, StatePart]) -> Iterator[str]:
    of_file, of_run = _by_parameter(saved), _by_parameter(parts)
    for parameter in sorted(of_file.keys() | of_run.keys()):
        had, keeps = of_file.get(parameter, []), of_run.get(parameter, [])
        if not keeps:
            yield f"{parameter}: there is saved state of it, but it is no parameter of this optimizer"
        elif had != keeps:
            yield f"{parameter}: the saved state has {had}, this optimizer keeps {keeps}"


def _by_parameter(names: Mapping[str, object]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        parameter, _, key = name.rpartition("/")
        found.setdefault(parameter, []).append(key)
    return found


def _kind_problems(saved: Mapping[str, list[SavedPart]], parts: Mapping[str, StatePart]) -> Iterator[str]:
    """State tensors that are in the files in another dtype, or of another shape as a whole."""
    for name, part in parts.items():
        parameter, _, key = name.rpartition("/")
        own = (str(part.values.dtype) if part.scales is None else _encoding(part), tuple(part.shape))
        for piece in saved.get(name, []):
            if (piece.kind, tuple(piece.shape)) != own:
                yield f"{parameter}: the saved {key} is {piece.kind} {tuple(piece.shape)}, this optimizer keeps {own[0]} {own[1]}"
                break


def _covering(pieces: Sequence[SavedPart], start: int, count: int) -> list[tuple[SavedPart, int, int]]:
    """Which piece to read which columns [low, high) from, to get [start, start + count). Raises CheckpointError naming a gap."""
    position, found = start, []
    for piece in pieces:
        if piece.start <= position < min(piece.stop, start + count):
            found.append((piece, position, min(piece.stop, start + count)))
            position = found[-1][2]
    if position < start + count:
        files = ", ".join(sorted({piece.file.path.name for piece in pieces}))
        raise CheckpointError(f"{pieces[0].name}: nothing is saved of its columns from {position} on; it is in {files}, but not all of it")
    return found


# --------------------------------------------------------------------------------------------------------------------- filling
def _fill(part: StatePart, pieces: Sequence[SavedPart]) -> None:
    if part.values.numel() == 0:
        return
    start, count = _columns(part)
    covering = _covering(pieces, start, count)
    if part.scales is not None:
        _fill_8bit(part, covering)
        return
    for piece, low, high in covering:
        target = part.values[..., low - start : high - start] if part.shape else part.values
        target.copy_(piece.read(low, high))


def _fill_8bit(part: StatePart, covering: Sequence[tuple[SavedPart, int, int]]) -> None:
    assert part.scales is not None
    num_codes, num_scales = code_shapes(_local_shape(part.shape, part.count).numel())
    codes, scales = part.values.view(-1)[:num_codes], part.scales.view(-1)[:num_scales]
    first = covering[0][0]
    if (first.start, first.count) == (part.start, part.count):
        codes.copy_(first.file.read(first.name))
        scales.copy_(first.file.read(first.name + SCALE))
        return
    rows = math.prod(part.shape[:-1])
    width = part.count if rows > 1 else REQUANTIZED_AT_ONCE
    for low in range(part.start, part.start + part.count, width):
        high = min(low + width, part.start + part.count)
        overlaps = [(piece, max(low, begin), min(high, end)) for piece, begin, end in covering if begin < high and end > low]
        values = torch.cat([piece.dequantize(begin, end) for piece, begin, end in overlaps], dim=1).view(-1)
        new_codes, new_scales = torch.empty(values.shape, dtype=torch.uint8), torch.empty(code_shapes(values.numel())[1])
        quantize_(new_codes, new_scales, values, signed=part.signed, generator=None)
        position = (low - part.start) * rows  # a multiple of BLOCK: zero, or one of REQUANTIZED_AT_ONCE
        codes[position : position + len(new_codes)].copy_(new_codes)
        scales[position // BLOCK : position // BLOCK + len(new_scales)].copy_(new_scales)


def _columns(part: StatePart) -> tuple[int, int]:
    """`start` and `count` of a part; what has no axes counts as one column."""
    return (part.start, part.count) if part.shape else (0, 1)


def _local_shape(shape: torch.Size, count: int) -> torch.Size:
    return torch.Size((*shape[:-1], count)) if shape else shape


def _encoding(part: StatePart) -> str:
    return PLAIN if part.scales is None else SIGNED if part.signed else UNSIGNED
