"""What happens to moments and history when the basis of their subspace changes from P_old to P_new, with C = P_new' P_old.

Without this they would be read in a basis in which they were not written, whose singular vectors have arbitrary signs.
Letters: r rank (new x old in C), b long side, s history, k = r b.
"""

from __future__ import annotations

import torch
from torch import Tensor


def change_of_basis(new_ar: Tensor, old_ar: Tensor) -> Tensor:
    """C = P_new' P_old, shape (r_new, r_old), in fp32 or wider."""
    dtype = torch.promote_types(new_ar.dtype, torch.float32)
    return new_ar.to(dtype).mT @ old_ar.to(dtype)


def rotate_moments(change_rr: Tensor, first_rb: Tensor, second_rb: Tensor, betas: tuple[float, float], t: int) -> tuple[Tensor, Tensor]:
    """m <- C m, and v by LDAdam's form (arXiv:2410.16103), which cannot turn negative:

    v <- (1 - b2^t) | (C o C)(v^ - m^ o m^) + (C m^) o (C m^) |, where m^ and v^ are bias-corrected after t updates: the variance of
    each new coordinate if the old ones were uncorrelated, plus the square of its mean. Changing the sign of basis vectors changes
    nothing.
    """
    correction1, correction2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    mean_rb = first_rb / correction1
    rotated_mean_rb = change_rr @ mean_rb
    variance_rb = second_rb / correction2 - mean_rb.square()
    second = (change_rr.square() @ variance_rb).add_(rotated_mean_rb.square()).abs_().mul_(correction2)
    return rotated_mean_rb.mul_(correction1), second


def rotate_history_(change_rr: Tensor, history_sk: Tensor) -> None:
    """h <- C h for each remembered gradient, in place, one at a time."""
    for row_k in history_sk:
        row_rb = row_k.view(change_rr.shape[1], -1)
        row_rb.copy_(change_rr @ row_rb.to(change_rr.dtype))
