"""The coroutines of many updates run side by side: all requests of a round that are alike share one collective.

Every rank runs the updates of the same parameters in the same order, and each asks for the same things whatever its numbers are, so the
rounds of all ranks match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ngpt.dist.collectives import Collectives
from ngpt.optim.sharding import Asking, Columns, Flat, Largest, OfFirst, Publish, Request, Sharding, Sum

T = TypeVar("T")
LARGE = 2**20  # elements of a weight that is gathered where it lies, by itself: sharing a collective costs four copies


def run_together(
    asking: Sequence[Asking[T]], *, sharding: Sharding, ranks: Collectives, wire: torch.dtype, over_ranks: bool = False
) -> list[T]:
    """Run all coroutines to their end and return what they return.

    Args:
        sharding: which part of each parameter this rank has.
        wire: dtype in which directions and changes of weights are sent.
        over_ranks: sums are over all ranks, also where nothing is sharded: each rank holds a term of the gradient.
    """
    answering = _Answers(sharding, ranks, wire, shards=ranks if over_ranks or sharding.parts > 1 else Collectives.single())
    results: dict[int, T] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(asking)))
    while answers:
        requests: dict[int, Request] = {}
        for number, answer in answers.items():
            try:
                requests[number] = next(asking[number]) if answer is None else asking[number].send(answer)
            except StopIteration as end:
                results[number] = end.value
        answers = answering.to(requests)
    return [results[number] for number in range(len(asking))]


class _Answers:
    def __init__(self, sharding: Sharding, ranks: Collectives, wire: torch.dtype, *, shards: Collectives) -> None:
        self._sharding, self._ranks, self._wire, self._shards = sharding, ranks, wire, shards

    def to(self, requests: dict[int, Request]) -> dict[int, Tensor | None]:
        answers: dict[int, Tensor | None] = {}
        together: tuple[tuple[type[Request], Callable[[Tensor], Tensor]], ...] = (
            (Sum, self._shards.sum_),
            (Largest, self._shards.max_),
            (OfFirst, self._ranks.broadcast_),
        )
        for kind, collective in together:
            alike = {number: request.value for number, request in requests.items() if isinstance(request, kind)}
            answers |= _joined(alike, collective)
        answers |= self._columns({n: request for n, request in requests.items() if isinstance(request, Columns)})
        answers |= self._flat({n: request for n, request in requests.items() if isinstance(request, Flat)})
        answers |= self._publish({n: request for n, request in requests.items() if isinstance(request, Publish)})
        return {number: answers[number] for number in requests}

    def _columns(self, requests: dict[int, Columns]) -> dict[int, Tensor]:
        """Gather columns, each rank's padded to the same number."""
        parts, padded = self._shards.size, {}
        if parts == 1:
            return {number: request.value for number, request in requests.items()}
        for number, request in requests.items():
            share, value = -(-request.width // parts), request.value
            room = value.new_zeros(*value.shape[:-1], share, dtype=self._wire if request.as_weight else value.dtype)
            room[..., : value.shape[-1]] = value
            padded[number] = room
        wholes: dict[int, Tensor] = {}
        for number, parts_of_all in _gathered(padded, self._shards).items():
            request = requests[number]
            stacked = parts_of_all.view(parts, *padded[number].shape).movedim(0, -2)  # (..., parts, share)
            whole = stacked.reshape(*stacked.shape[:-2], -1)[..., : request.width]
            wholes[number] = whole.to(request.value.dtype)
        return wholes

    def _flat(self, requests: dict[int, Flat]) -> dict[int, Tensor]:
        """Exchange columns of changes for flat slices of them."""
        if self._shards.size > 1:
            rounded = {n: dataclasses.replace(request, value=request.value.to(self._wire)) for n, request in requests.items()}
        else:
            rounded = requests
        blocks = {number: Exchange(request, self._sharding, self._shards) for number, request in rounded.items()}
        received: dict[int, list[Tensor]] = {number: [] for number in blocks}
        for alike in _by_dtype({number: request.value for number, request in rounded.items()}):
            to_send = [torch.cat([blocks[number].for_rank(rank).reshape(-1) for number in alike]) for rank in range(self._shards.size)]
            sizes = {number: blocks[number].sizes_from() for number in alike}
            arrived = self._shards.exchange(to_send, [sum(sizes[number][rank] for number in alike) for rank in range(self._shards.size)])
            for rank, joined in enumerate(arrived):
                for number, piece in zip(alike, joined.split([sizes[number][rank] for number in alike]), strict=True):
                    received[number].append(piece)
        return {number: block.assemble(received[number]).to(requests[number].value.dtype) for number, block in blocks.items()}

    def _publish(self, requests: dict[int, Publish]) -> dict[int, Tensor]:
        """Make weights whole again from everybody's flat slices, where they are kept whole."""
        if self._sharding.keeps_weights_whole and self._shards.size > 1:
            padded = {}
            for number, request in requests.items():
                weight = request.parameter.detach()
                if weight.numel() >= LARGE and weight.numel() % self._shards.size == 0:
                    self._shards.spread_(weight.view(self._shards.size, -1))
                    continue
                room = request.value.new_zeros(-(-request.parameter.numel() // self._shards.size))
                room[: len(request.value)] = request.value
                padded[number] = room
            for number, slices in _gathered(padded, self._shards).items():
                weight = requests[number].parameter.detach().view(-1)
                weight.copy_(slices.reshape(-1)[: len(weight)])
        return {number: request.value for number, request in requests.items()}


class Exchange:
    """How the columns (a, b_k) of a change of one weight, on every rank, become flat slices of the weight's elements.

    A slice lies in some rows of the weight; every rank sends the part of these rows that it has.
    """

    def __init__(self, request: Flat, sharding: Sharding, shards: Collectives) -> None:
        self._shape = sharding.shape(request.parameter)
        self._is_wide = self._shape[0] < self._shape[1]
        self._own = request.value if self._is_wide else request.value.mT  # as the weight lies
        self._me, self._ranks = shards.rank, shards.size

    def for_rank(self, rank: int) -> Tensor:
        """What `rank` needs of what is here."""
        first, last = self._rows(rank)
        if self._is_wide:
            return self._own[first:last]
        start, stop = self._span(self._me, max(self._shape))
        first, last = max(first, start), min(last, stop)
        return self._own[first - start : max(first, last) - start]

    def sizes_from(self) -> list[int]:
        """Numbers of elements that come from each rank."""
        first, last = self._rows(self._me)
        sizes = []
        for rank in range(self._ranks):
            start, stop = self._span(rank, max(self._shape))
            rows, columns = (last - first, stop - start) if self._is_wide else (max(0, min(last, stop) - max(first, start)), self._shape[1])
            sizes.append(rows * columns)
        return sizes

    def assemble(self, pieces: list[Tensor]) -> Tensor:
        """This rank's flat slice, from what every rank has sent."""
        first, last = self._rows(self._me)
        if self._is_wide:
            rows = torch.cat([piece.view(last - first, -1) for piece in pieces if len(piece)], dim=1) if last > first else pieces[0]
        else:
            rows = torch.cat(pieces)
        start, stop = self._span(self._me, self._shape.numel())
        offset = first * self._shape[1]
        return rows.reshape(-1)[start - offset : stop - offset]

    def _rows(self, rank: int) -> tuple[int, int]:
        """The rows of the weight in which the slice of `rank` lies."""
        start, stop = self._span(rank, self._shape.numel())
        return (start // self._shape[1], -(-stop // self._shape[1])) if stop > start else (0, 0)

    def _span(self, rank: int, length: int) -> tuple[int, int]:
        share = -(-length // self._ranks)
        return min(rank * share, length), min((rank + 1) * share, length)


def _by_dtype(values: dict[int, Tensor]) -> list[list[int]]:
    dtypes = dict.fromkeys(value.dtype for value in values.values())
    return [[number for number, value in values.items() if value.dtype == dtype] for dtype in dtypes]


def _joined(values: dict[int, Tensor], collective: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Run a collective that works in place on copies of all values at once."""
    answers: dict[int, Tensor] = {}
    for alike in _by_dtype(values):
        joined = collective(torch.cat([values[number].reshape(-1) for number in alike]))
        pieces = joined.split([values[number].numel() for number in alike])
        answers |= {number: piece.view(values[number].shape) for number, piece in zip(alike, pieces, strict=True)}
    return answers


def _gathered(parts: dict[int, Tensor], shards: Collectives) -> dict[int, Tensor]:
    """The parts of all ranks, (N, numel) each."""
    wholes: dict[int, Tensor] = {}
    for alike in _by_dtype(parts):
        together = shards.all_gather(torch.cat([parts[number].reshape(-1) for number in alike]))
        pieces = together.split([parts[number].numel() for number in alike], dim=1)
        wholes |= dict(zip(alike, pieces, strict=True))
    return wholes
