"""Weights that all ranks hold must be the same bits on all of them: a cheap hash of each, compared over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from ngpt.dist.collectives import Collectives

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements whose bits are 8 bytes each for a moment
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio


class ReplicasDiffer(RuntimeError):
    """Ranks hold different weights where all should hold the same."""


def check_replicas(tensors: Iterable[tuple[str, Tensor]], collectives: Collectives, *, step: int) -> None:
    """Compare the tensors of all ranks, which give the same names and shapes in the same order.

    Raises:
        ReplicasDiffer: on all ranks, naming the ranks whose tensors differ from those of most others, and the first such tensor.
    """
    names, hashes = [], []
    for name, tensor in tensors:
        names.append(name)
        hashes.append(bit_hash(tensor))
    if collectives.size == 1 or not hashes:
        return
    of_ranks = collectives.all_gather(torch.stack(hashes)).tolist()
    for name, of_tensor in zip(names, zip(*of_ranks, strict=True), strict=True):
        most_common = Counter(of_tensor).most_common(1)[0][0]
        others = [str(rank) for rank, value in enumerate(of_tensor) if value != most_common]
        if others:
            raise ReplicasDiffer(
                f"step {step}: {name} on rank{'s' * (len(others) > 1)} {', '.join(others)} differs from the other ranks', and all should "
                "hold the same bits; a bit of memory may have flipped, or the ranks run different code. Start again: the run continues "
                "from its last checkpoint"
            )


def bit_hash(tensor: Tensor) -> Tensor:
    """An int64 scalar on the device: the sum modulo 2^64 of the elements' bits, each times an odd number of its place.

    One changed element always changes it, and so does exchanging two that differ in their low bits.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, bits.numel(), _CHUNK):
        chunk = bits[first : first + _CHUNK].to(torch.int64)
        places = torch.arange(first, first + len(chunk), device=tensor.device)
        total += (chunk * ((places * _ODD) | 1)).sum()
    return total
