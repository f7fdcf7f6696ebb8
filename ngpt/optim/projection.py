"""The low-rank subspace of a gradient: which side is projected, how a basis is found, how to go in and out of it.

Everything here sees a matrix with its short side first, (a, b) with a <= b: `short_side_first` is the one place that decides about
the transpose. Letters: a short side, b long side, r rank. All functions are pure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OVERSAMPLING = 8  # extra columns of the range finder; 5-10 are the usual choice (Halko, Martinsson, Tropp 2011)
POWER_ITERATIONS = 2


def short_side_first(matrix: Tensor) -> Tensor:
    """The matrix itself if m < n, else its transpose (a view). A square matrix counts as tall, as in GaLore."""
    rows, columns = matrix.shape
    return matrix if rows < columns else matrix.mT


def project(grad_ab: Tensor, basis_ar: Tensor) -> Tensor:
    """R = P'G, shape (r, b), in the dtype of the basis (GaLore, arXiv:2403.03507)."""
    return basis_ar.mT @ grad_ab.to(basis_ar.dtype)


def lift_onto_(weight_ab: Tensor, basis_ar: Tensor, low_rb: Tensor, factor: float) -> None:
    """W <- W + factor P N in place; without a full-size temporary when W and P have one dtype."""
    if weight_ab.dtype == basis_ar.dtype:
        weight_ab.addmm_(basis_ar, low_rb, alpha=factor)
        return
    low_rb = low_rb.to(basis_ar.dtype)
    if weight_ab.is_contiguous():
        weight_ab.add_(basis_ar @ low_rb, alpha=factor)
    else:  # a transposed weight: make the product in the memory order of the weight, so that the sum does not stride
        weight_ab.mT.add_(low_rb.mT @ basis_ar.mT, alpha=factor)


def exact_basis(grad_ab: Tensor, rank: int) -> Tensor:
    """The first r left singular vectors, shape (a, r), by a full SVD."""
    left, _, _ = torch.linalg.svd(grad_ab, full_matrices=False)
    return left[:, :rank]


def randomized_basis(grad_ab: Tensor, rank: int, previous_ar: Tensor | None, generator: torch.Generator) -> Tensor:
    """Approximate first r left singular vectors, ordered, shape (a, r), by a randomized range finder.

    Halko, Martinsson, Tropp 2011 (algorithms 4.4 and 5.1): Y = G Omega, or Y = G (G' [P_old, Omega]) when there is an old basis to
    start from; then power iterations, QR, and the eigenvectors of the small matrix (Q'G)(Q'G)'. Each product with G is linear in G
    and thin.
    """
    short, long = grad_ab.shape
    width = min(rank + OVERSAMPLING, short)
    if previous_ar is None:
        start_bw = torch.randn(long, width, generator=generator, device=grad_ab.device, dtype=grad_ab.dtype)
    else:
        fresh = torch.randn(short, width - rank, generator=generator, device=grad_ab.device, dtype=grad_ab.dtype) / math.sqrt(short)
        start_bw = grad_ab.mT @ torch.cat([previous_ar.to(grad_ab.dtype), fresh], dim=1)
    sketch_aw = grad_ab @ start_bw
    for _ in range(POWER_ITERATIONS):
        sketch_aw = grad_ab @ (grad_ab.mT @ torch.linalg.qr(sketch_aw).Q)
    range_aw = torch.linalg.qr(sketch_aw).Q
    small_wb = range_aw.mT @ grad_ab
    ascending_ww = torch.linalg.eigh(small_wb @ small_wb.mT).eigenvectors
    return range_aw @ ascending_ww.flip(1)[:, :rank]


def find_basis(grad_ab: Tensor, rank: int, *, subspace: str, previous_ar: Tensor | None, generator: torch.Generator) -> Tensor | None:
    """A basis (a, r) for this gradient in fp32 or fp64, or None where the gradient is zero or not finite and so shows no direction.

    Reads one number from the device. That is the only place where an update waits for the device, and the factorisations of a
    refresh wait for it anyway.
    """
    grad_ab = grad_ab.to(torch.promote_types(grad_ab.dtype, torch.float32))
    largest = torch.linalg.vector_norm(grad_ab, ord=torch.inf).item()
    if not 0 < largest < math.inf:
        return None
    grad_ab = grad_ab / largest  # squares of tiny gradients would be lost in fp32
    if subspace == "svd":
        return exact_basis(grad_ab, rank)
    return randomized_basis(grad_ab, rank, previous_ar, generator)
