"""The factored Fisher: second moments of the projected gradient between its r rows, applied as a damped inverse square root.

A <- b2 A + (1 - b2) R R'/b and R~ = (A^ + lambda tr(A^)/r I)^(-1/2) R, with A^ the bias-corrected A: one Kronecker factor of the
empirical Fisher of R (K-FAC, arXiv:1503.05671; Shampoo, arXiv:1802.09568), at r^2 numbers for the s r b of a history. The power -1/2
makes the rows of R~ uncorrelated with mean square 1 where -1 would blow up the directions that hold only noise; Adam follows and would
undo any scale.

The root is found seldom (an eigendecomposition) and kept. Both matrices are symmetric and kept as their upper triangles: A in fp32, the
root in the parameter's dtype. Letters: r rank, b long side.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ngpt.optim.storage import compute_dtype

ROOT_INTERVAL = 20  # updates between two roots of a matrix; Shampoo's practice is 10 to 100

State = dict[str, Tensor]


def allocate_factor(rank: int, like: Tensor) -> State:
    """Zero state for projected gradients of this rank of the parameter `like`."""
    size = rank * (rank + 1) // 2
    root_dtype = torch.float32 if like.dtype == torch.float16 else like.dtype  # 1 / |R| is soon beyond the range of fp16
    return {
        "fisher_factor": torch.zeros(size, dtype=compute_dtype(like), device=like.device),
        "fisher_root": torch.zeros(size, dtype=root_dtype, device=like.device),
    }


def covariance(low_rb: Tensor, width: int) -> Tensor:
    """The upper triangle (r (r + 1) / 2) of C = R R'/b, for b = `width`. Of a part of the columns of R it is a part of the sum."""
    return _packed(low_rb @ low_rb.mT) / width


def remember_(state: State, covariance: Tensor, beta2: float) -> None:
    """A <- b2 A + (1 - b2) C, for the triangle of `covariance`."""
    state["fisher_factor"].lerp_(covariance, 1 - beta2)


def find_root_(state: State, rank: int, beta2: float, t: int, damping: float) -> None:
    """Compute (A^ + lambda tr(A^)/r I)^(-1/2) after t updates of A and keep it. Zero where A is zero: of what, nothing is known yet.

    NaN if A is not finite, as an update from a bad gradient is anywhere else.
    """
    factor_rr = _unpacked(state["fisher_factor"], rank) / (1 - beta2**t)
    finite = factor_rr.isfinite().all()
    eigenvalues_r, vectors_rr = torch.linalg.eigh(torch.where(finite, factor_rr, 0.0))  # which would raise for what is not finite
    mean = eigenvalues_r.clamp(min=0).mean()
    floor = torch.finfo(factor_rr.dtype).tiny
    powers_r = (eigenvalues_r.clamp(min=0) + damping * mean).clamp(min=floor).rsqrt()
    root_rr = (vectors_rr * torch.where(mean > floor, powers_r, torch.zeros_like(powers_r))) @ vectors_rr.mT
    state["fisher_root"].copy_(torch.where(finite, _packed(root_rr), torch.nan))


def start_root_(state: State, rank: int, beta2: float, t: int) -> None:
    """Give a root that is zero, as at the start, the size 1 / sqrt(tr(A^)/r) in all directions until the first one is due.

    It stays zero where A is: a scale made up before the first gradient would be in the moments for as long as they remember.
    """
    mean = _unpacked(state["fisher_factor"], rank).diagonal().mean() / (1 - beta2**t)
    scale = torch.where(mean > torch.finfo(mean.dtype).tiny, mean.rsqrt(), torch.zeros_like(mean))
    alike = _packed(scale * torch.eye(rank, dtype=mean.dtype, device=mean.device))
    root = state["fisher_root"]
    root.copy_(torch.where(root[0] > 0, root, alike))


def apply_root(state: State, low_rb: Tensor) -> Tensor:
    """R~, shape (r, b)."""
    return _unpacked(state["fisher_root"], low_rb.shape[0]).to(low_rb.dtype) @ low_rb


def rotate_factor_(state: State, change_rr: Tensor) -> None:
    """A <- C A C' + tr(A)/r (I - C C'): what the old basis did not have counts as the mean of what it had. The root has to be found again.

    Without the second term it would count as nothing: R~ would be up to lambda^(-1/2) too large there until the next root, and a second
    moment remembers that, so that steps would be too small long afterwards.
    """
    factor_rr = _unpacked(state["fisher_factor"], change_rr.shape[1])
    unknown_rr = torch.eye(change_rr.shape[0], dtype=change_rr.dtype, device=change_rr.device) - change_rr @ change_rr.mT
    state["fisher_factor"].copy_(_packed(change_rr @ factor_rr @ change_rr.mT + factor_rr.diagonal().mean() * unknown_rr))


@functools.lru_cache(maxsize=16)
def _triangle(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries of the upper triangle are in a symmetric (r, r) matrix, and where all of its entries are in the triangle."""
    rows, columns = torch.triu_indices(rank, rank, device=device)
    places_rr = torch.empty(rank, rank, dtype=torch.int64, device=device)
    places_rr[rows, columns] = places_rr[columns, rows] = torch.arange(len(rows), device=device)
    return rows * rank + columns, places_rr.flatten()


def _packed(symmetric_rr: Tensor) -> Tensor:
    rank = symmetric_rr.shape[0]
    return symmetric_rr.flatten().index_select(0, _triangle(rank, symmetric_rr.device)[0])


def _unpacked(triangle: Tensor, rank: int) -> Tensor:
    return triangle.index_select(0, _triangle(rank, triangle.device)[1]).view(rank, rank)
