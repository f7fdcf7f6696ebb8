"""Statistics of single updates: what an optimizer reports of each parameter while somebody watches, at no cost while nobody does.

    optimizer.watch = Watch()
    optimizer.watch.begin()           # before the backward passes of an update; without it only refreshes of bases are noted
    loss.backward(); optimizer.step()
    optimizer.watch.end()             # {"layers.0.mlp.up.weight": {"gradient_rms": 1e-4, "update_rms": 2e-6, ...}, ...}

Reports are sums of squares of what is here, 0-dim tensors on the device that nobody waits for; `end` adds up those of all processes and
reads all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.optim.rotation import change_of_basis
from ngpt.optim.storage import compute_dtype


@dataclass(frozen=True)
class _Update:
    """The update of a parameter: of its gradient as the update takes it, of what it changed, and of the new weight, each squared."""

    name: str
    numel: int
    rank: int | None
    takes_full_gradient: bool
    squares: Tensor  # (3,) of the parts that are here


class Watch:
    """Takes the reports of one update after the other. An attribute of the optimizer; `active` between `begin` and `end`."""

    def __init__(self) -> None:
        self.active = False
        self._overlaps: dict[Tensor, Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        self._scale = 1.0
        self._updates: dict[Tensor, _Update] = {}
        self._projections: dict[Tensor, Tensor] = {}  # (3,): squares before and after, and how many

    def begin(self) -> None:
        """Watch the next update."""
        self._clear()
        self.active = True

    def end(self, sum_over_ranks: Callable[[Tensor], Tensor] = lambda own: own, *, counts: bool = True) -> dict[str, dict[str, float]]:
        """Stop watching; what there is to say of each parameter that was updated, by its name. Waits for the device.

        Root mean squares are over all elements of the weight: `update_rms` of the change (learning rate, weight decay and rounding
        included), `weight_rms` after it, `gradient_rms` of the gradient before clipping. Of a projected matrix also
        `projected_gradient_rms`, of P'G, over as many elements, so that the two can be compared; `captured_energy`,
        |P'G|^2 / |G|^2; the `rank`; and `overlap`, |P_new' P_old|^2 / r of its last refresh that replaced a basis.

        Where a matrix keeps only projected gradients, those of all micro-batches and processes are never added up in full: then there
        is no `gradient_rms`, and `captured_energy` has sums over these gradients above and below the line. What is not known, or 0/0,
        is left out. An update that was dropped has no statistics.

        Args:
            sum_over_ranks: adds up a tensor over all processes.
            counts: whether this process is to count where all of them hold the same.
        """
        self.active = False
        if not self._updates:
            return {}
        rows = []
        for p, update in self._updates.items():
            projected = self._projections.get(p)
            if projected is None:
                projected = torch.zeros_like(update.squares)
            if not counts:  # what only this process has still counts: the terms of a gradient
                projected = torch.zeros_like(projected) if update.takes_full_gradient else projected
            rows.append(torch.cat([update.squares if counts else torch.zeros_like(update.squares), projected]))
        device = rows[0].device
        overlaps = [self._overlaps[p].to(device) for p in self._updates if p in self._overlaps]
        together = sum_over_ranks(torch.stack([row.to(device) for row in rows]))
        numbers = torch.cat([together.flatten(), *(overlap[None] for overlap in overlaps)]).tolist()
        known_overlaps = iter(numbers[6 * len(rows) :])
        found = {}
        for position, (p, update) in enumerate(self._updates.items()):
            figures = _figures(update, *numbers[6 * position : 6 * position + 6])
            found[update.name] = figures | ({"overlap": next(known_overlaps)} if p in self._overlaps else {})
        self._clear()
        return found

    # ----------------------------------------------------------------------------------------------------------- reports
    def scaled(self, factor: float) -> None:
        """The gradient was multiplied by `factor`, as clipping does."""
        self._scale *= factor

    def projected(self, p: Tensor, grad_ab: Tensor, low_rb: Tensor) -> None:
        """A gradient, or a term or a part of it, was projected."""
        report = torch.stack([self._gradient_square(grad_ab), self._gradient_square(low_rb), _square(p.new_ones(()))])
        self._projections[p] = self._projections[p] + report if p in self._projections else report

    def updated(
        self, p: Tensor, *, name: str, numel: int, rank: int | None, full: bool, gradient: Tensor, before: Tensor, after: Tensor
    ) -> None:
        """A weight, or the part of it that is here, was updated from its (`full` or projected) `gradient`. Overwrites `before`."""
        squares = [self._gradient_square(gradient), _square(before.sub_(after)), _square(after)]
        self._updates[p] = _Update(name, numel, rank, full, torch.stack([square.to(p.device) for square in squares]))

    def turned(self, p: Tensor, new_ar: Tensor, old_ar: Tensor) -> None:
        """A new basis takes the place of an old one."""
        self._overlaps[p] = _square(change_of_basis(new_ar, old_ar)) / new_ar.shape[1]

    def _gradient_square(self, gradient: Tensor) -> Tensor:
        return _square(gradient) / self._scale**2


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=compute_dtype(values)).double().square()


def _figures(
    update: _Update, gradient: float, change: float, weight: float, full: float, low: float, projections: float
) -> dict[str, float]:
    """What follows from sums of squares."""

    def root_mean(square: float) -> float:
        return math.sqrt(square / update.numel)

    figures = {"update_rms": root_mean(change), "weight_rms": root_mean(weight)}
    if update.takes_full_gradient:
        figures["gradient_rms"] = root_mean(gradient)
    elif projections == 1:
        figures["gradient_rms"] = root_mean(full)
    if update.rank is not None:
        figures |= {"rank": update.rank, "projected_gradient_rms": root_mean(low if update.takes_full_gradient else gradient)}
        if full > 0:
            figures["captured_energy"] = low / full
    return figures
