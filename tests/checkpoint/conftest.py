"""Optimizer state made by hand, whole and in any parts, without an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from ngpt.optim.quantization import code_shapes, dequantize, quantize_
from ngpt.optim.state import StatePart


@dataclass(frozen=True)
class Whole:
    """A whole state tensor: `kind` is a dtype, or "signed" or "unsigned" for 8 bits; `cut` whether layouts cut it into parts."""

    values: torch.Tensor
    kind: object
    cut: bool

    @staticmethod
    def random(shape, kind, *, cut):
        if kind in (torch.int64, torch.uint8):
            return Whole(torch.randint(0, 99, shape).to(kind), kind, cut)
        values = torch.randn(shape)
        if not isinstance(kind, torch.dtype):
            return Whole(values.square() if kind == "unsigned" else values, kind, cut)
        return Whole(values.to(kind), kind, cut)

    def part(self, start, stop):
        """A live part of columns [start, stop); 8-bit codes in blocks of its own."""
        shape = self.values.shape
        values = self.values[..., start:stop].clone() if shape else self.values.clone()
        if isinstance(self.kind, torch.dtype):
            return StatePart(values, shape, start, stop - start)
        num_codes, num_scales = code_shapes(values.numel())
        codes, scales = torch.empty(num_codes, dtype=torch.uint8), torch.empty(num_scales)
        quantize_(codes, scales, values.reshape(-1), signed=self.kind == "signed", generator=None)
        return StatePart(codes, shape, start, stop - start, scales, self.kind == "signed")


def cuts(length, ranks):
    """Columns of each rank: ceil(length / ranks) each, the last ones shorter or empty."""
    step = -(-length // ranks)
    return [(min(rank * step, length), min((rank + 1) * step, length)) for rank in range(ranks)]


def layout(state, ranks):
    """Parts of a whole state by rank."""
    result = [{} for _ in range(ranks)]
    for name, whole in state.items():
        length = whole.values.shape[-1] if whole.values.ndim else 0
        for rank, (start, stop) in enumerate(cuts(length, ranks) if whole.cut else [(0, length)] * ranks):
            result[rank][name] = whole.part(start, stop)
    return result


def blank(parts):
    """The same parts with other values in them, as they are in a new optimizer."""
    return {
        name: StatePart(
            torch.full_like(part.values, 7),
            part.shape,
            part.start,
            part.count,
            None if part.scales is None else torch.full_like(part.scales, 7),
            part.signed,
        )
        for name, part in parts.items()
    }


def values_of(part):
    """What a part stands for, in fp32 where it is kept in 8 bits."""
    if part.scales is None:
        return part.values
    local = (*part.shape[:-1], part.count)
    return dequantize(part.values, part.scales, signed=part.signed).view(local)


def same_bits(first, second):
    return all(
        a is b is None or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
        for a, b in ((first.values, second.values), (first.scales, second.scales))
    )


@pytest.fixture
def parts_kit():
    """The functions above."""
    return SimpleNamespace(Whole=Whole, cuts=cuts, layout=layout, blank=blank, values_of=values_of, same_bits=same_bits)
