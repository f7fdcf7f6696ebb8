"""The natural gradient: the inverse empirical Fisher of the last s projected gradients, applied through an s x s system.

F = lambda I + H H', where the columns of H are the last s gradients in the subspace, the current one R included (Natural GaLore,
arXiv:2410.16029). Woodbury gives F^-1 R = (R - H z)/lambda with (lambda I + H'H) z = H'R. Because R is a column of H,
R = H e, this is equal to

    F^-1 R = H y,   (lambda I + H'H) y = e                                                  (push-through identity)

which neither subtracts nearly equal numbers nor divides by lambda, so that a small lambda costs no digits (docs/math.md has measurements).

The inner products, the s x s solve and the product H y are fp64, whatever H is stored in: with repeated gradients y has large entries that
cancel, and fp32 would leave noise of up to 1e-7 trace(H'H) / lambda. So the result is exact for the history as stored.

Letters: s history, k = r b entries (b the long side) of a projected gradient. Functions are pure but for the trailing underscore.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 4096 * torch.finfo(torch.float64).eps  # of trace(H'H), 1e-12: a smaller damping would be lost in the rounding of H'H itself
CHUNK_ELEMENTS = {"cpu": 1 << 18}  # entries of H widened to fp64 at a time: what a core's cache holds,
CHUNK_ELEMENTS_ELSEWHERE = 1 << 24  # or, on accelerators, what makes launching kernels cheap (128 MiB)


def remember_(history_sk: Tensor, low_k: Tensor, slot: int) -> Tensor:
    """Put a projected gradient in one row of the history. Returns its inner products (s,) with all rows, in fp64: one pass over H.

    They are those of the history as stored (rounded to bf16 where it is), so that it and the Gram matrix never drift apart. Rows that
    were never written are zero and change nothing. Of a part of the columns they are a part of the sum.
    """
    history_sk[slot] = low_k
    row_s = torch.zeros(history_sk.shape[0], dtype=torch.float64, device=history_sk.device)
    for chunk in _column_chunks(history_sk):
        wide = chunk.double()
        row_s += wide @ wide[slot]
    return row_s


def enter_row_(gram_ss: Tensor, row_s: Tensor, slot: int) -> None:
    """Bring the Gram matrix H'H up to date after `remember_`."""
    gram_ss[slot] = row_s
    gram_ss[:, slot] = row_s


def natural_gradient(history_sk: Tensor, gram_ss: Tensor, slot: int, damping: float) -> Tensor:
    """F^-1 R for the gradient R in `slot` of the history; shape (k,), in fp64, to be rounded by the caller.

    `damping` is lambda. It is raised to 4096 eps trace(H'H) if it is smaller.
    """
    size = history_sk.shape[0]
    raised = (FLOOR * gram_ss.trace()).clamp(min=damping)
    damped_ss = gram_ss + torch.diag_embed(raised.expand(size))
    unit_s1 = torch.zeros(size, 1, dtype=gram_ss.dtype, device=gram_ss.device)
    unit_s1[slot] = 1.0
    factor_ss, _ = torch.linalg.cholesky_ex(damped_ss)  # `_ex`: does not wait for the device to check for failure
    weights_s = torch.cholesky_solve(unit_s1, factor_ss).squeeze(1)
    return torch.cat([weights_s @ chunk.double() for chunk in _column_chunks(history_sk)])


def gram_matrix(history_sk: Tensor) -> Tensor:
    """H'H from scratch, shape (s, s), in fp64: needed when the whole history has changed (a rotated basis).

    Of a part of the columns it is a part of the sum.
    """
    gram_ss = torch.zeros(history_sk.shape[0], history_sk.shape[0], dtype=torch.float64, device=history_sk.device)
    for chunk in _column_chunks(history_sk):
        wide = chunk.double()
        gram_ss += wide @ wide.mT
    return gram_ss


def _column_chunks(history_sk: Tensor) -> tuple[Tensor, ...]:
    elements = CHUNK_ELEMENTS.get(history_sk.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    return history_sk.split(max(1, elements // history_sk.shape[0]), dim=1)
