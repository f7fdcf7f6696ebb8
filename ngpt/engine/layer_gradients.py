"""The gradients of a layer under ZeRO: taken, projected or packed, summed over ranks together, and handed on in this rank's parts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ngpt.dist.collectives import Collectives, Reduction
from ngpt.optim import AdamW
from ngpt.optim.low_rank import LowRankAdamW
from ngpt.optim.projection import short_side_first
from ngpt.optim.sharding import Asking
from ngpt.optim.storage import compute_dtype


class Layer:
    """The gradients of the parameters that share collectives, from backward to update.

    On the wire, the part of rank k is: slices of plain parameters and columns of matrices whose update needs the full gradient; for
    each parameter how many ranks have had a gradient; then columns of projected gradients. The first two have places that are known
    before any gradient comes, so each is copied to its place at once and freed.
    """

    def __init__(self, optimizer: AdamW, params: list[Tensor], ranks: Collectives, wire: torch.dtype) -> None:
        self.params = params
        self._optimizer, self._sharding, self._ranks, self._wire = optimizer, optimizer.sharding, ranks, wire
        self._shapes = {p: self._sharding.shape(p) for p in params}
        self._whole = [p for p in params if optimizer.keeps_full_gradient(p)]
        self._thin = [p for p in params if not optimizer.keeps_full_gradient(p)]
        self._places: dict[Tensor, slice] = {}
        start = 0
        for p in self._whole:
            self._places[p] = slice(start, start := start + self._part_numel(p))
        self._counts = slice(start, start + len(params))
        self._buffer: Tensor | None = None  # (parts, numel) of what is whole, and counts
        self._reduction: Reduction | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything of this update."""
        if self._reduction is not None:
            self._reduction.wait()
        for p in self.params:
            self._optimizer.drop_gradient(p)
        self.received: set[Tensor] = set()
        self._buffer = self._own = self._reduction = None
        self._low: dict[Tensor, Tensor] = {}  # projected gradients that are not summed yet
        self._full: dict[Tensor, Tensor] = {}  # full gradients in which a basis has to be found
        self._first = self._last = self._keep = True

    # ---------------------------------------------------------------------------------------------------------- backward
    def begin(self, *, first: bool, keep: bool, last: bool) -> None:
        """Before a micro-batch; `keep`: gradients stay here, unsummed, until the last one."""
        self.received.clear()
        self._first, self._keep, self._last = first, keep, last
        self._wants_basis = {p for p in self._thin if self._optimizer.wants_basis(p, first=first)}

    @property
    def keeps_matrices(self) -> bool:
        """Whether full gradients of matrices are kept until they are summed."""
        return any(len(self._shapes[p]) > 1 for p in self._whole)

    @property
    def is_complete(self) -> bool:
        return len(self.received) == len(self.params)

    def receive(self, p: Tensor, grad: Tensor) -> None:
        """Take the gradient of one micro-batch; afterwards the full one is needed no more, unless a basis has to be found in it."""
        self.received.add(p)
        self._optimizer.check_gradient(p, grad)
        if self._optimizer.keeps_full_gradient(p):
            self._pack(self._room()[:, self._places[p]], p, grad if self._shape_on_wire(p) is None else short_side_first(grad))
        elif p in self._wants_basis:
            self._full[p] = grad
        else:
            self._add_low(p, grad)

    def searches(self) -> list[Asking[None]]:
        """Coroutines, over ranks, that find the bases that are due. A rank without the gradient takes part with zeros."""
        found: list[Asking[None]] = []
        for p in self._thin:
            assert isinstance(self._optimizer, LowRankAdamW)
            if p in self._wants_basis:
                grad = self._full.get(p)
                zeros = functools.partial(torch.zeros, self._shapes[p], dtype=p.dtype, device=p.device)
                found.append(self._optimizer.prepare_basis(p, short_side_first(zeros() if grad is None else grad), first=self._first))
        return found

    def start_reduction(self) -> None:
        """Project what has waited for a basis; start to sum, if it is time."""
        for p in list(self._full):
            self._add_low(p, self._full.pop(p))
        room = self._room()
        for number, p in enumerate(self.params):
            room[:, self._counts.start + number] += p in self.received
        if self._keep and not self._last:
            return
        parts, start = [room], self._counts.stop
        for p in self._thin:
            part = room.new_zeros(self._sharding.parts, self._part_numel(p))
            self._places[p] = slice(start, start := start + part.shape[1])
            if p in self._low:
                self._pack(part, p, self._low.pop(p))
            parts.append(part)
        self._buffer = None
        whole = (torch.cat(parts, dim=1) if len(parts) > 1 else room).to(self._wire)
        self.collect()  # what an earlier micro-batch may have left
        self._reduction = self._ranks.reduce_scatter(whole) if self._sharding.parts > 1 else self._ranks.start_sum(whole[0])

    def collect(self) -> None:
        """Wait for a sum that has been started, and add it to those of earlier micro-batches."""
        if self._reduction is not None:
            own, self._reduction = self._reduction.wait(), None
            if self._own is not None:
                self._own = self._own.to(compute_dtype(own)).add_(own)
            else:
                self._own = own

    def _add_low(self, p: Tensor, grad: Tensor) -> None:
        assert isinstance(self._optimizer, LowRankAdamW)
        low = self._optimizer.project(p, short_side_first(grad))
        self._low[p] = self._low[p].add_(low) if p in self._low else low

    def _room(self) -> Tensor:
        """The buffer, in the dtype of the wire if it sees one micro-batch only."""
        if self._buffer is None:
            accumulates = self._keep and not (self._first and self._last)
            dtype = compute_dtype(self.params[0]) if accumulates else self._wire
            self._buffer = torch.zeros(self._sharding.parts, self._counts.stop, dtype=dtype, device=self.params[0].device)
        return self._buffer

    # ----------------------------------------------------------------------------------------------------------- on the wire
    def _shape_on_wire(self, p: Tensor) -> tuple[int, int] | None:
        return self._optimizer.reduced_shape(p)

    def _share(self, length: int) -> int:
        return -(-length // self._sharding.parts)

    def _part_numel(self, p: Tensor) -> int:
        shape = self._shape_on_wire(p)
        return self._share(self._shapes[p].numel()) if shape is None else shape[0] * self._share(shape[1])

    def _pack(self, room: Tensor, p: Tensor, reduced: Tensor) -> None:
        """Add a gradient to (parts, numel of a part): row k is what rank k gets."""
        parts, shape = self._sharding.parts, self._shape_on_wire(p)
        if shape is None:
            flat, share = reduced.reshape(-1), room.shape[1]
            full = len(flat) // share if share else 0
            room[:full].add_(flat[: full * share].view(full, share))
            if full < parts:
                room[full, : len(flat) - full * share].add_(flat[full * share :])
            return
        rows, share = reduced.shape[0], self._share(shape[1])
        blocks = room.view(parts, -1, share)  # as many rows as the layout has: those beyond the gradient's own stay zero
        for part, columns in zip(blocks, reduced.split(share, dim=1), strict=False):
            part[:rows, : columns.shape[1]].add_(columns)

    def part(self, p: Tensor) -> Tensor:
        """This rank's part of the summed gradient, as the optimizer takes it."""
        assert self._own is not None
        shape, own = self._shape_on_wire(p), self._own[self._places[p]]
        if shape is None:
            first, last = self._sharding.span(self._shapes[p].numel())
            own = own[: last - first]
            return own if self._sharding.is_split else own.view(self._shapes[p])
        first, last = self._sharding.span(shape[1])
        own = own.view(shape[0], -1)[:, : last - first].contiguous()
        if not self._optimizer.keeps_full_gradient(p):
            return own.to(compute_dtype(p))
        is_wide = self._shapes[p][0] < self._shapes[p][1]
        return own if self._sharding.is_split or is_wide else own.mT

    def counts(self) -> Tensor:
        """(params,) on how many ranks, over all micro-batches, each parameter has had a gradient."""
        assert self._own is not None
        return self._own[self._counts]

    # ------------------------------------------------------------------------------------------------------------- norms
    def square(self) -> Tensor:
        """Sum of the squares of this rank's parts, fp64, 0-dim."""
        if self._own is None:
            return torch.zeros((), dtype=torch.float64, device=self.params[0].device)
        pieces = (self._own[: self._counts.start], self._own[self._counts.stop :])
        squares = [torch.linalg.vector_norm(piece, dtype=compute_dtype(piece)).double().square() for piece in pieces]
        return squares[0] + squares[1]

    def scale_(self, factor: float) -> None:
        assert self._own is not None
        self._own[: self._counts.start].mul_(factor)
        self._own[self._counts.stop :].mul_(factor)

    def live_bytes(self) -> int:
        kept = [self._buffer, self._own, self._reduction, *self._low.values(), *self._full.values()]
        return sum(part.nbytes for part in kept if part is not None)
