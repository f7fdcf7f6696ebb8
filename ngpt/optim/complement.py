"""What the projection dropped, G - P P'G, added back to the update (Fira, arXiv:2410.01623), and the limiter that keeps it from exploding.

Fira scales column j of the complement like Adam scaled column j of the projected gradient: phi_j = |N_j| / |R_j|, S = phi o (G - P R).

With P'P = I the update P N + k S is P (N - k phi o R) + k phi o G, and |S_j|^2 = phi_j^2 (|G_j|^2 - |R_j|^2): neither the complement nor
a second full-size matrix is ever formed. Letters: a short side, b long side, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

COMPLEMENTS = ("none", "fira", "raw")
GROWTH = 1.01  # gamma of Fira's limiter
EPS = 1e-8  # Fira's


def fira_scale(direction_rb: Tensor, low_rb: Tensor) -> Tensor:
    """phi of shape (b)."""
    return torch.linalg.vector_norm(direction_rb, dim=0) / (torch.linalg.vector_norm(low_rb, dim=0) + EPS)


def scaled_complement_sq(scale_b: Tensor, grad_ab: Tensor, low_rb: Tensor) -> Tensor:
    """|phi o (G - P R)|^2, 0-dim, for an orthonormal P. Of a part of the columns it is a part of the sum."""
    dropped_b = torch.linalg.vector_norm(grad_ab, dim=0, dtype=low_rb.dtype).square() - torch.linalg.vector_norm(low_rb, dim=0).square()
    return (scale_b.square() * dropped_b.clamp(min=0)).sum()


def limit_growth_(norm_state: Tensor, norm: Tensor) -> Tensor:
    """The factor that keeps a norm from growing by more than `GROWTH` a step; remembers the limited norm. 0-dim, on the device.

    A remembered norm of zero, as at the start, limits nothing.
    """
    largest = torch.where(norm_state > 0, GROWTH * norm_state, norm)
    factor = torch.where(norm > largest, largest / norm, torch.ones_like(norm))
    norm_state.copy_(norm * factor)
    return factor
