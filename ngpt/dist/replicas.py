"""What all ranks hold must be the same on all of them, weights to the bit and the place in the data: hashes, compared over ranks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ngpt.dist.collectives import Collectives

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements whose bits are 8 bytes each for a moment
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio


class ReplicasDiffer(RuntimeError):
    """Ranks hold different weights where all should hold the same, or have come to different places in the data."""


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
        if odd := _odd_ones(dict(enumerate(of_tensor))):
            raise ReplicasDiffer(
                f"step {step}: {name} on {_named(odd)} differs from the other ranks', and all should hold the same bits; a bit of memory "
                "may have flipped, or the ranks run different code. Start again: the run continues from its last checkpoint"
            )


def check_position(position: Mapping[str, Any], collectives: Collectives, *, step: int, device: torch.device | str = "cpu") -> None:
    """Compare where the ranks are in the data: `position` has a JSON-able value for every part of it that this rank knows of.

    What only one rank knows is compared with nothing.

    Raises:
        ReplicasDiffer: on all ranks, naming the ranks whose place differs from that of most others, and in what.
    """
    hashes = {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16] for name, value in position.items()}
    of_ranks = [json.loads(text) for text in collectives.gather_bytes(json.dumps(hashes).encode(), device)]
    for name in sorted(set().union(*of_ranks)):
        if odd := _odd_ones({rank: known[name] for rank, known in enumerate(of_ranks) if name in known}):
            raise ReplicasDiffer(
                f"step {step}: the position in the data on {_named(odd)} differs from the other ranks' in {name}, so that batches would be "
                "left out or come twice; the ranks see different files, or run different code. See to that and start again: the run "
                "continues from its last checkpoint"
            )


def _odd_ones(of_ranks: Mapping[int, Any]) -> list[int]:
    """Ranks that have something else than most of them; of two that differ, the higher."""
    most_common = Counter(of_ranks.values()).most_common(1)[0][0]
    return [rank for rank, value in of_ranks.items() if value != most_common]


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


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
