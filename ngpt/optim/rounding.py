"""Rounding new weights to bf16: to nearest, or stochastically so that updates smaller than half a unit are kept on average."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_BITS = -65536  # 0xFFFF0000: sign, exponent and the upper 7 mantissa bits of an fp32 number are a bf16 number
MAGNITUDE_BITS = 0x7FFFFFFF
LARGEST_BF16 = 0x7F7F0000


def counter_seed(seed: int, *counters: int) -> int:
    """A 63-bit seed that depends on every argument (splitmix64 steps).

    Random numbers named by what they are for, rather than drawn from a running generator, need no state to be saved: a resumed run,
    and every rank that holds the same weight, draws the same ones.
    """
    value = 0
    for counter in (seed, *counters):
        value = (value ^ counter) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


def generator_for(device: torch.device, seed: int, *counters: int) -> torch.Generator:
    """A fresh generator on `device`, seeded by `counter_seed`."""
    return torch.Generator(device=device).manual_seed(counter_seed(seed, *counters))


def random_16_bits(like: Tensor, generator: torch.Generator) -> Tensor:
    """Integers 0 ... 65535 as int32, of the shape of `like`. Each draw of the generator gives four."""
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[: like.numel()].to(torch.int32).bitwise_and_(0xFFFF).view(like.shape)


def stochastic_round_(target: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """Write the fp32 tensor `exact` into the bf16 tensor `target`, up or down with probabilities that make the mean right.

    Adds 16 random bits to the 16 bits that bf16 drops and cuts them off. Values that bf16 holds stay as they are. Where the carry could
    turn a finite number into infinity, or change an infinity or NaN, nothing is added, so the value is cut off towards zero.
    """
    assert (exact.dtype, target.dtype) == (torch.float32, torch.bfloat16), (exact.dtype, target.dtype)
    bits = exact.contiguous().view(torch.int32)
    noise = random_16_bits(bits, generator)
    noise.masked_fill_(bits.bitwise_and(MAGNITUDE_BITS) >= LARGEST_BF16, 0)
    target.copy_(noise.add_(bits).bitwise_and_(KEPT_BITS).view(torch.float32))
