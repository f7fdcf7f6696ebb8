"""What an update adds to a weight: a lifted low-rank matrix, a full one scaled by rows or columns, or both; formed only if it must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.optim.projection import lift_onto_

Bases = tuple[Tensor, ...]  # (a, r) of the short side; where both sides are projected, (b, r) of the long side too


@dataclass(frozen=True)
class Change:
    """What an update adds to a weight, or to some of its columns, the short side first.

    factor (P L + X diag(columns)), P L Q' where both sides are projected, L where nothing is; or factor diag(rows) X, where `rows` are
    given. X (a, b) is `full`.
    """

    bases: Bases
    low: Tensor | None
    factor: float
    full_ab: Tensor | None = None
    columns_b: Tensor | None = None
    rows_a: Tensor | None = None

    def add_to_(self, weight_ab: Tensor, factor: float) -> None:
        """W <- W + factor (...) in place. The change itself is never formed."""
        if self.full_ab is not None and self.rows_a is not None:
            weight_ab.addcmul_(self.full_ab, self.rows_a[:, None], value=factor)
        if self.full_ab is not None and self.columns_b is not None:
            weight_ab.addcmul_(self.full_ab.to(weight_ab.dtype), self.columns_b, value=factor)
        if self.low is not None and self.bases:
            lift_onto_(weight_ab, self.bases[0], self._low_of_short_side(self.low), factor)
        elif self.low is not None:
            weight_ab.add_(self.low, alpha=factor)

    def columns(self) -> Tensor:
        """The change of these columns without its factor, (a, b)."""
        wide = self.full_ab if self.low is None else self.low
        assert wide is not None
        short = self.bases[0].shape[0] if self.bases else wide.shape[0]
        matrix_ab = torch.zeros(short, wide.shape[1], dtype=wide.dtype, device=wide.device)
        self.add_to_(matrix_ab, 1.0)
        return matrix_ab

    def elements(self, start: int, stop: int, shape: Sequence[int]) -> Tensor:
        """Elements [start, stop) of a change of all columns without its factor and X, in the row-major order of a weight of this shape."""
        assert self.low is not None
        rows, columns = shape
        first, last = start // columns, -(-stop // columns)
        low_rb, basis_ar = self._low_of_short_side(self.low), self.bases[0]
        if rows < columns:
            lifted = basis_ar[first:last].to(low_rb.dtype) @ low_rb
        else:
            lifted = low_rb[:, first:last].mT @ basis_ar.to(low_rb.dtype).mT
        return lifted.reshape(-1)[start - first * columns : stop - first * columns]

    def _low_of_short_side(self, low: Tensor) -> Tensor:
        for basis_br in self.bases[1:]:
            low = low.to(basis_br.dtype) @ basis_br.mT
        return low
