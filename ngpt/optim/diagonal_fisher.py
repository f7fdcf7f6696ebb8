"""The Kronecker-diagonal Fisher of the full gradient: one number for each row and each column.

p and q are EMAs of the row and column means of G o G, so that G_ij o G_ij ~ p_i q_j / mean(p), and the preconditioner

    D_ij = sqrt(mean(p) / (p_i q_j))                                 (1)

makes the entries of D o G of mean square 1 along every row and column (a diagonal Shampoo, arXiv:1802.09568; RACS, arXiv:2502.07752,
iterates it to a fixed point; Adafactor, arXiv:1804.04235, has the same factored form as its second moment). D is separable, D = u w', so
D o X = diag(u) X diag(w) for any X, and it sees every direction of the gradient, those that the subspace drops too.

Damping is relative: p_i + lambda mean(p) and q_j + lambda mean(q) stand for p_i and q_j. Letters: a short side, b long side.
"""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def allocate_means(short: int, long: int, dtype: torch.dtype, device: torch.device) -> State:
    """Zero state for a gradient of shape (short, long)."""
    return {
        "short_mean_sq": torch.zeros(short, dtype=dtype, device=device),
        "long_mean_sq": torch.zeros(long, dtype=dtype, device=device),
    }


def mean_squares(grad_ab: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row means (a) and column means (b) of G o G, the row means over `width` columns: of a part of them, they are a part of the sum."""
    squares_ab = grad_ab.to(dtype).square()
    return squares_ab.sum(1) / width, squares_ab.mean(0)


def remember_(state: State, row_means_a: Tensor, column_means_b: Tensor, beta2: float) -> None:
    """Bring p and q up to date with the mean squares of a gradient."""
    state["short_mean_sq"].lerp_(row_means_a, 1 - beta2)
    state["long_mean_sq"].lerp_(column_means_b, 1 - beta2)


def scales(state: State, beta2: float, t: int, damping: float) -> tuple[Tensor, Tensor]:
    """u (a) and w (b) with D = u w', after t updates of p and q. Finite for rows, columns and gradients that were zero all along."""
    correction = 1 - beta2**t
    p, q = state["short_mean_sq"] / correction, state["long_mean_sq"] / correction
    tiny = torch.finfo(p.dtype).tiny
    mean = p.mean().clamp(min=tiny**0.75)
    return (p / mean + damping).clamp(min=tiny).rsqrt(), (q + damping * mean).clamp(min=tiny).rsqrt()
