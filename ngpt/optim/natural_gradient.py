"""The natural gradient: the inverse empirical Fisher of the last s projected gradients, applied through an s x s system.

F = lambda I + H H', where the columns of H are the last s gradients in the subspace, the current one R included (Natural GaLore,
arXiv:2410.16029, eq. 8 and 9). Woodbury gives F^-1 R = (R - H z)/lambda with (lambda I + H'H) z = H'R. Because R is a column of H,
R = H e, this is equal to

    F^-1 R = H y,   (lambda I + H'H) y = e                                                  (push-through identity)

which neither subtracts nearly equal numbers nor divides by lambda, so that a small lambda costs no digits.

Letters: s history, k = r n entries of a projected gradient. Functions are pure but for the trailing underscore.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumOverShards = Callable[[Tensor], Tensor]
FLOOR = 64.0  # in units of round-off: below FLOOR * eps * trace(H'H) the damping is lost in the rounding of H'H itself
CHUNK_ELEMENTS = 1 << 22  # entries of a bf16 history that are widened to fp32 at one time


def identity(value: Tensor) -> Tensor:
    """The sum over shards of a process that holds everything."""
    return value


def remember_(history_sk: Tensor, gram_ss: Tensor, low_k: Tensor, slot: int, *, sum_over_shards: SumOverShards = identity) -> None:
    """Put a projected gradient in one row of the history and bring the Gram matrix H'H up to date: one row, one pass over H.

    The Gram matrix is that of the history as stored (rounded to bf16 where it is), so the two never drift apart. Rows that were
    never written are zero and change nothing.
    """
    history_sk[slot] = low_k
    row_s = sum_over_shards(_inner_products(history_sk, history_sk[slot], gram_ss.dtype))
    gram_ss[slot] = row_s
    gram_ss[:, slot] = row_s


def natural_gradient(history_sk: Tensor, gram_ss: Tensor, slot: int, damping: float) -> Tensor:
    """F^-1 R for the gradient R in `slot` of the history; shape (k,), dtype of the Gram matrix.

    The s x s Cholesky is done in fp64: it costs nothing at this size, and lambda may be far below the largest entry. The damping is
    raised to 64 eps trace(H'H) if it is smaller, because the fp32 Gram matrix is not known better than that.
    """
    size = history_sk.shape[0]
    floor = FLOOR * torch.finfo(gram_ss.dtype).eps * gram_ss.diagonal().sum(dtype=torch.float64)
    damped_ss = gram_ss.double() + torch.diag_embed(floor.clamp(min=damping).expand(size))
    unit_s1 = torch.zeros(size, 1, dtype=torch.float64, device=gram_ss.device)
    unit_s1[slot] = 1.0
    factor_ss, _ = torch.linalg.cholesky_ex(damped_ss)  # `_ex`: does not wait for the device to check for failure
    weights_s = torch.cholesky_solve(unit_s1, factor_ss).squeeze(1).to(gram_ss.dtype)
    return torch.cat([weights_s @ chunk.to(weights_s.dtype) for chunk in _column_chunks(history_sk)])


def gram_matrix(history_sk: Tensor, dtype: torch.dtype, *, sum_over_shards: SumOverShards = identity) -> Tensor:
    """H'H from scratch, shape (s, s): needed when the whole history has changed (a rotated basis)."""
    gram_ss = torch.zeros(history_sk.shape[0], history_sk.shape[0], dtype=dtype, device=history_sk.device)
    for chunk in _column_chunks(history_sk):
        wide = chunk.to(dtype)
        gram_ss += wide @ wide.mT
    return sum_over_shards(gram_ss)


def _inner_products(history_sk: Tensor, low_k: Tensor, dtype: torch.dtype) -> Tensor:
    """<h_i, low> for every row i, shape (s,)."""
    row_s = torch.zeros(history_sk.shape[0], dtype=dtype, device=history_sk.device)
    for chunk, part in zip(_column_chunks(history_sk), _column_chunks(low_k.unsqueeze(0), history_sk.shape[0]), strict=True):
        row_s += chunk.to(dtype) @ part[0].to(dtype)
    return row_s


def _column_chunks(history_sk: Tensor, rows: int | None = None) -> tuple[Tensor, ...]:
    return history_sk.split(max(1, CHUNK_ELEMENTS // (rows or history_sk.shape[0])), dim=1)
