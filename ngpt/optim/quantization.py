"""Moments in 8 bits: block-wise codes with one scale per 256 values, rounded stochastically so that slow averages keep moving.

Two maps, one for each moment:

- unsigned (second moment): an 8-bit float without a sign, five bits of exponent and three of mantissa, times a power of two per block.
  Code 0 is exactly 0, code c > 0 is s 2^(c // 8 - 31) (1 + (c mod 8) / 8): relative spacing 1/15 to 1/8 over 31.7 octaves, so that a
  value down to 6e-10 of its block's maximum has the same relative error as the maximum itself. Codes come from the bits of the fp32
  number. As scales are powers of two, levels stay where they are while the maximum of the block drifts: only what changes is rounded.
- signed (first moment): fourth powers, code c is s sign(c) (c / 127)^4 with s the largest magnitude of the block: dense near zero, as
  coordinates with small gradients need, where equally spaced levels would round most of them to nothing.

v <- b2 v + (1 - b2) g^2 moves v by about 0.1 % a step, far less than a level: rounding to nearest would freeze it. So would m where it
is small beside its block: with b1 = 0.9 a coordinate without gradients stops falling at 5e-4 of the block's maximum while sqrt(v) goes on.
Both should be given a generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ngpt.optim.rounding import random_16_bits

BLOCK = 256  # values that share a scale

MANTISSA_BITS_OF_FP32 = 23
DROPPED_BITS = 20  # of the 23, leaving three
BELOW_A_LEVEL = (1 << DROPPED_BITS) - 1
HALF_A_LEVEL = 1 << DROPPED_BITS - 1
LOWEST = 127 - 31 << MANTISSA_BITS_OF_FP32  # bits of 2^-31, where the levels of a block of scale 1 begin
EXPONENT_BITS = 0x7F800000
SMALLEST_SCALE = 127 - 95 << MANTISSA_BITS_OF_FP32  # bits of 2^-95: with it the smallest level is still a normal number
LARGEST_SCALE = 127 + 127 << MANTISSA_BITS_OF_FP32  # bits of 2^127

LARGEST_SIGNED = 127
FOURTH_POWER = float(LARGEST_SIGNED**4)
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def code_shapes(numel: int) -> tuple[int, int]:
    """Numbers of codes (uint8) and of scales (fp32) that `numel` values need; the last block may be a part of one."""
    return numel, -(-numel // BLOCK)


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The fp32 values (n,) of codes (n,) and scales (ceil(n / BLOCK),). All of a block is NaN if it was given a NaN or an infinity."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    level = _signed_level if signed else _unsigned_level
    for out, code, scale in _blocks(values, codes, scales):
        torch.mul(level(code), scale, out=out)
    return values


def quantize_(codes: Tensor, scales: Tensor, values: Tensor, *, signed: bool, generator: torch.Generator | None) -> None:
    """Store fp32 `values` (n,) in `codes` (uint8, (n,)) and `scales` (fp32, (ceil(n / BLOCK),)), in place.

    With a generator (of the device of the values) each value goes to one of its two neighbouring levels, with the probabilities that make
    the mean right (16 random bits a value); without, to the nearest. What the levels hold exactly stays as it is. Error bounds, relative
    to the value unless said otherwise:

    - unsigned: 1/17 to nearest, 1/8 stochastically, from 6e-10 of the block's maximum upwards (and from 1.4e-38 to 3.1e38). A positive
      value below the smallest level takes that level, also stochastically: m / (sqrt(v) + eps) with v = 0 would be a leap, while too large
      a v only makes the step of that coordinate smaller. Negative values count as 0.
    - signed: with y = 127 (|x| / maximum)^(1/4), half the distance between the neighbouring levels in y to nearest, the whole
      stochastically: about 2 / y and 4 / y of the value, and at most 4e-9 of the maximum for y < 1. A block whose maximum is below the
      smallest normal number is zero.

    A block of zeros has scale 0. A NaN or an infinity makes the scale NaN, and so every value of the block: a bad update stays visible.
    """
    store = _store_signed_ if signed else _store_unsigned_
    for code, scale, value in _blocks(codes, scales, values, scaled=1):
        store(code, scale, value, generator)


def _blocks(first: Tensor, second: Tensor, third: Tensor, *, scaled: int = 2) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views (blocks, BLOCK), then (1, rest) where there is one, of the values or codes; (blocks, 1) of number `scaled`, the scales."""
    tensors = (first, second, third)
    whole = first.numel() // BLOCK
    for rows, start, stop in ((slice(0, whole), 0, whole * BLOCK), (slice(whole, whole + 1), whole * BLOCK, first.numel())):
        if stop > start:
            width = min(BLOCK, stop - start)
            yield tuple(t[rows, None] if i == scaled else t[start:stop].view(-1, width) for i, t in enumerate(tensors))  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------------- unsigned
def _unsigned_level(codes: Tensor) -> Tensor:
    wide = codes.to(torch.int32)
    bits = wide.clamp(max=1).mul_(LOWEST)  # code 0 keeps the bits of 0
    return bits.add_(wide.bitwise_left_shift_(DROPPED_BITS)).view(torch.float32)


def _store_unsigned_(codes: Tensor, scales: Tensor, values: Tensor, generator: torch.Generator | None) -> None:
    largest = values.amax(1, keepdim=True)
    # Stochastically a maximum between 1.875 and 2 may become 2: then the block needs the next power of two already.
    carry = HALF_A_LEVEL if generator is None else BELOW_A_LEVEL
    power = largest.view(torch.int32).add(carry).bitwise_and_(EXPONENT_BITS).clamp_(SMALLEST_SCALE, LARGEST_SCALE).view(torch.float32)
    scales.copy_(torch.where(largest > 0, power, 0.0).masked_fill_(~largest.isfinite(), float("nan")))

    bits = (values / power).view(torch.int32).clamp_(min=0)  # a division by a power of two is exact but for underflow
    if generator is None:
        bits.add_(HALF_A_LEVEL - LOWEST)
    else:
        half_a_draw = 1 << DROPPED_BITS - 17  # so that the 16 bits are right on average
        bits.add_(random_16_bits(values, generator).bitwise_left_shift_(DROPPED_BITS - 16)).add_(half_a_draw - LOWEST)
    bits.bitwise_right_shift_(DROPPED_BITS)
    is_positive = values.view(torch.int32).clamp(0, 1)
    codes.copy_(torch.maximum(bits.clamp_(max=255), is_positive))


# --------------------------------------------------------------------------------------------------------------------- signed
def _signed_level(codes: Tensor) -> Tensor:
    roots = codes.view(torch.int8).to(torch.float32)
    squares = roots.mul_(roots.abs())
    return squares.mul_(squares.abs()).div_(FOURTH_POWER)


def _store_signed_(codes: Tensor, scales: Tensor, values: Tensor, generator: torch.Generator | None) -> None:
    roots = values.abs()
    largest = roots.amax(1, keepdim=True)
    usable = (largest >= SMALLEST_NORMAL) & largest.isfinite()
    scales.copy_(torch.where(usable, largest, 0.0).masked_fill_(~largest.isfinite(), float("nan")))

    roots.div_(torch.where(usable, largest, float("inf"))).sqrt_().sqrt_().mul_(LARGEST_SIGNED)
    whole = roots.round_() if generator is None else _round_between_fourth_powers(roots, generator)
    codes.view(torch.int8).copy_(whole.copysign_(values).to(torch.int32))


def _round_between_fourth_powers(roots: Tensor, generator: torch.Generator) -> Tensor:
    """c or c + 1 for y in [c, c + 1], c + 1 with probability (y^4 - c^4) / ((c + 1)^4 - c^4), so that the mean of fourth powers is y^4."""
    low = roots.floor()
    above = (roots - low).mul_(roots + low).mul_(roots.square().addcmul_(low, low))
    gap = torch.addcmul(low, low, low).mul_(2).add_(1).mul_(low.mul(2).add_(1))
    draw = random_16_bits(roots, generator).to(torch.float32).add_(0.5).mul_(2**-16)
    return low.add_(above.div_(gap).add_(draw).floor_())
