"""What an update asks of the other processes, and which part of a parameter this process has: all of it, unless somebody shards.

An update is a coroutine: where a number depends on what others hold, it says `total = yield Sum(part)` and goes on with the answer. On one
process `alone` answers every request with its own value. A sharding runs the updates of a whole layer in lock-step and answers the
requests of a round with one collective. So there is one implementation of each method, and it reads as if there were one process.

What is sharded: a plain parameter by flat slices of its elements; a projected matrix (a short side, b long side, r rank) by columns of
the long side, the last axis of the projected gradient R (r, b), of moments, history and column means. Bases, Gram matrices, r x r
factors, row means, norms and counters are replicated.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A question to the other processes. The answer is a new tensor, or `value` itself."""

    value: Tensor


class Sum(Request):
    """The sum of `value` over the shards."""


class Largest(Request):
    """The largest `value` of the shards, element by element. Infinite is fine, NaN is not."""


class OfFirst(Request):
    """The `value` of the first process: where all should have the same, but rounding could make them differ."""


@dataclass(frozen=True)
class Columns(Request):
    """The `width` columns of all shards, (..., width), where `value` (..., own) are those of this one.

    `as_weight` allows to send them in the dtype of weights; then all get the rounded ones, this process too.
    """

    width: int
    as_weight: bool = False


@dataclass(frozen=True)
class Flat(Request):
    """The flat slice of this process of a change of the weight of `parameter`, of which `value` (a, b_k) are its columns."""

    parameter: Tensor


@dataclass(frozen=True)
class Publish(Request):
    """The flat slice `value` of the weight of `parameter` is new: make the weight whole again where all of it is kept."""

    parameter: Tensor


T = TypeVar("T")
Asking = Generator[Request, Tensor, T]  # a coroutine that yields requests, is sent answers, and returns a T


def alone(asking: Asking[T]) -> T:
    """Run a coroutine on a process that has everything."""
    try:
        request = next(asking)
        while True:
            request = asking.send(request.value)
    except StopIteration as end:
        return end.value


class Sharding:
    """Which part of each parameter, of its gradient and of its state this process has. This one: all of it."""

    parts = 1
    index = 0
    keeps_weights_whole = True  # and not only the flat slice of this process

    def shape(self, p: Tensor) -> torch.Size:
        """Shape of the whole parameter."""
        return p.shape

    def flat(self, p: Tensor) -> Tensor:
        """The elements of the weight that this process updates if it updates a flat slice: a 1-D view."""
        return p.detach().view(-1)[slice(*self.span(p.numel()))]

    def state_device(self, p: Tensor) -> torch.device:
        """Where moments, history and master copy are kept, the large parts of the state. The rest is where the weight is."""
        return p.device

    def span(self, length: int) -> tuple[int, int]:
        """[start, stop) of this process in an axis of `length`: equal parts, of which the last may be shorter or empty."""
        share = -(-length // self.parts)
        return min(self.index * share, length), min((self.index + 1) * share, length)

    @property
    def is_split(self) -> bool:
        """Whether a parameter, or its state, is not all here."""
        return self.parts > 1 or not self.keeps_weights_whole


WHOLE = Sharding()
