"""How a moment is kept between updates: in fp32, in bf16, or in 8 bits a value with a scale for each block (`state_dtype`).

Arithmetic is always in fp32 (fp64 for fp64 parameters). A moment that is kept in fewer bits is read into a temporary and written back,
some rows at a time, so that temporaries stay small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.optim import quantization
from ngpt.optim.rounding import stochastic_round_

STATE_DTYPES = ("fp32", "bf16", "8bit")
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
PIECE_ELEMENTS = {"cpu": 1 << 18}  # values treated at one time: temporaries stay in a core's cache,
PIECE_ELEMENTS_ELSEWHERE = 1 << 24  # or, on accelerators, small beside the weights without costing kernel launches


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the arithmetic of updates, and of moments kept in "fp32": fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(tensor.dtype, torch.float32)


def piece_elements(tensor: Tensor) -> int:
    """How many values of a large tensor are updated at one time."""
    return PIECE_ELEMENTS.get(tensor.device.type, PIECE_ELEMENTS_ELSEWHERE)


def rows_per_piece(tensor: Tensor, state: dict[str, Tensor]) -> int:
    """Rows of a tensor (at least 1-D) that make a piece; with 8-bit state, such that a piece is made of whole blocks."""
    width = max(1, tensor[:1].numel())
    rows = max(1, piece_elements(tensor) // width)
    unit = quantization.BLOCK // math.gcd(width, quantization.BLOCK) if "exp_avg_scale" in state else 1
    return -(-rows // unit) * unit


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that are written, and so have their memory pages, now: `torch.zeros` would leave those to the first update."""
    return torch.empty(shape, dtype=dtype, device=device).zero_()


def allocate(key: str, shape: torch.Size, state_dtype: str, like: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Zero state tensors for a moment of this shape of the parameter `like`: `key` itself and, with 8 bits, `key`_scale."""
    if state_dtype == "8bit":
        num_codes, num_scales = quantization.code_shapes(shape.numel())
        return {
            key: zeros([num_codes], torch.uint8, device),
            f"{key}_scale": zeros([num_scales], torch.float32, device),
        }
    dtype = compute_dtype(like) if state_dtype == "fp32" else torch.bfloat16
    same_layout = shape == like.shape  # also that of a transposed weight, so that arithmetic with it does not stride
    return {key: torch.empty_like(like, dtype=dtype, device=device).zero_() if same_layout else zeros(shape, dtype, device)}


@dataclass(frozen=True)
class Stored:
    """A moment, or some whole rows of it: (rows, ...) values as they are kept."""

    values: Tensor
    scales: Tensor | None
    shape: torch.Size
    signed: bool

    @staticmethod
    def of(state: dict[str, Tensor], key: str, shape: torch.Size) -> Stored:
        """The moment `key` of the given shape, which may have fewer rows than were allocated."""
        values, scales = torch.atleast_1d(state[key]), state.get(f"{key}_scale")
        if scales is not None:
            num_codes, num_scales = quantization.code_shapes(shape.numel())
            return Stored(values[:num_codes], scales[:num_scales], shape, SIGNED[key])
        return Stored(values[: shape[0]], None, shape, SIGNED[key])

    def tensors(self) -> list[Tensor]:
        """The parts of the state that hold it."""
        return [self.values] if self.scales is None else [self.values, self.scales]

    def split(self, rows: int) -> list[Stored]:
        """Pieces of so many rows (a number from `rows_per_piece`), in order."""
        if self.shape[0] <= rows:
            return [self]
        starts = range(0, self.shape[0], rows)
        shapes = [torch.Size((min(rows, self.shape[0] - start), *self.shape[1:])) for start in starts]
        if self.scales is None:
            return [Stored(piece, None, piece.shape, self.signed) for piece in self.values.split(rows)]
        codes = self.values.split([shape.numel() for shape in shapes])
        scales = self.scales.split([quantization.code_shapes(shape.numel())[1] for shape in shapes])
        return [Stored(*parts, self.signed) for parts in zip(codes, scales, shapes, strict=True)]

    def read(self) -> Tensor:
        """The values for arithmetic: the state itself where it is kept in their dtype (to be changed in place), else a copy in fp32."""
        if self.scales is not None:
            return quantization.dequantize(self.values, self.scales, signed=self.signed).view(self.shape)
        return self.values.to(torch.float32) if self.values.dtype == torch.bfloat16 else self.values

    def write_(self, value: Tensor, generator: torch.Generator | None) -> None:
        """Keep new values; with fewer bits, rounded stochastically if there is a generator, else to nearest."""
        if self.scales is not None:
            quantization.quantize_(self.values, self.scales, value.reshape(-1), signed=self.signed, generator=generator)
        elif generator is not None and (self.values.dtype, value.dtype) == (torch.bfloat16, torch.float32):
            stochastic_round_(self.values, value, generator)
        elif value is not self.values:
            self.values.copy_(value)
