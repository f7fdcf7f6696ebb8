"""The low-rank subspace of a gradient: which side is projected, how a basis is found, how to go in and out of it.

Everything here sees a matrix with its short side first, (a, b) with a <= b: `short_side_first` is the one place that decides about
the transpose. Letters: a short side, b long side, r rank. All functions are pure; those of type `Asking` are coroutines (sharding.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ngpt.optim.sharding import Asking, Largest, OfFirst, Sum, alone

OVERSAMPLING = 8  # extra columns of the range finder; 5-10 are the usual choice (Halko, Martinsson, Tropp 2011)
MOST_POWER_ITERATIONS = 3
SETTLED = 0.01  # share of energy: less gained by half an iteration ends the iterations
FRESH_PART = 0.1  # size of the random part of each column that starts from an old basis, which may have become useless


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


def basis_and_energies(
    grad_ab: Tensor, rank: int, *, subspace: str, previous_ar: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """A basis (a, r) for this gradient in fp32 or fp64 and the share of ||G||_F^2 that each column catches (r,), descending.

    `subspace`: "svd", "randomized" or "random". None where the gradient is zero or not finite and so shows no direction.

    Reads numbers from the device, the only place where an update waits for it; the factorisations of a refresh wait anyway.
    """
    scaled_ab = alone(at_size_one(grad_ab))
    if scaled_ab is None:
        return None
    if subspace == "svd":
        left, values, _ = torch.linalg.svd(scaled_ab, full_matrices=False)
        energies = values.square()
        return left[:, :rank], energies[:rank] / energies.sum()
    basis_ar, energies = alone(search_basis(scaled_ab, rank, subspace=subspace, previous_ar=previous_ar, generator=generator))
    return basis_ar, (energies / scaled_ab.square().sum()).to(scaled_ab.dtype)


def find_basis(grad_ab: Tensor, rank: int, *, subspace: str, previous_ar: Tensor | None, generator: torch.Generator) -> Tensor | None:
    """The basis of `basis_and_energies` alone."""
    found = basis_and_energies(grad_ab, rank, subspace=subspace, previous_ar=previous_ar, generator=generator)
    return None if found is None else found[0]


def search_basis(
    grad_ab: Tensor, rank: int, *, subspace: str, previous_ar: Tensor | None, generator: torch.Generator, columns: bool = False
) -> Asking[tuple[Tensor, Tensor]]:
    """Basis (a, r) and energies (r,), descending, by "randomized" or "random": only thin products of G are ever asked for.

    `grad_ab` is this process' part of G, from `at_size_one`: its `columns`, or a term of a sum.
    """
    if subspace == "randomized":
        return (yield from randomized_range(grad_ab, rank, previous_ar, generator, columns=columns))
    basis_ar = random_basis(grad_ab, rank, generator)
    low_rb = basis_ar.mT @ grad_ab
    if not columns:
        low_rb = yield Sum(low_rb)
    energies = low_rb.square().sum(1)
    if columns:
        energies = yield Sum(energies)
    energies, order = energies.sort(descending=True, stable=True)
    return basis_ar[:, order], energies


def random_basis(grad_ab: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """A basis (a, r) drawn uniformly from all of them, for gradients with so many rows, whatever they hold."""
    dtype = torch.promote_types(grad_ab.dtype, torch.float32)
    gaussian_ar = torch.randn(grad_ab.shape[0], rank, generator=generator, device=grad_ab.device, dtype=dtype)
    return _orthonormal(gaussian_ar).to(dtype)


def cheap_basis(grad_ab: Tensor, rank: int) -> Tensor | None:
    """The r rows of largest energy as a basis: columns of the identity (a, r), ordered, the first of equal rows first.

    Costs about a pass over the gradient, for use until a matrix's turn for a better basis comes. None as in `basis_and_energies`.
    """
    scaled_ab = alone(at_size_one(grad_ab))
    if scaled_ab is None:
        return None
    rows = torch.linalg.vector_norm(scaled_ab, dim=1).sort(descending=True, stable=True).indices[:rank]
    basis_ra = scaled_ab.new_zeros(rank, scaled_ab.shape[0])
    return basis_ra.scatter_(1, rows[:, None], 1.0).mT


def at_size_one(grad_ab: Tensor) -> Asking[Tensor | None]:
    """The gradient in fp32 or wider, its largest entry about 1, as squares of tiny ones would be lost; None if zero or not finite.

    Divided by a power of two, so no digit changes, and a part or a term of a gradient has the same digits as in the whole.
    """
    grad_ab = grad_ab.to(torch.promote_types(grad_ab.dtype, torch.float32))
    largest = grad_ab.abs().amax() if grad_ab.numel() else grad_ab.new_zeros(())  # several times quicker than the infinity norm
    size = (yield Largest(largest.nan_to_num(nan=math.inf, posinf=math.inf))).item()
    if not 0 < size < math.inf:
        return None
    exponent = -math.frexp(size)[1]
    half = exponent // 2  # the whole power may be beyond the range of fp32
    return (grad_ab * 2.0**half).mul_(2.0 ** (exponent - half))


def randomized_range(
    grad_ab: Tensor, rank: int, previous_ar: Tensor | None, generator: torch.Generator, *, columns: bool = False
) -> Asking[tuple[Tensor, Tensor]]:
    """Basis (a, r) and energies (r,) by power iterations on a random or an old subspace (Halko, Martinsson, Tropp 2011, 4.4).

    An iteration is Z = G' orth(Y), Y = G orth(Z), w = r + OVERSAMPLING columns each: thin, and linear in G, so that of a sum of gradients
    only thin matrices are summed. ||Z||^2 and ||Y||^2 are lower bounds, ever better ones, of the energy that can be caught: when they
    meet, the subspace has settled. As orth(Z) has orthonormal columns, the singular vectors and values of Y are those of G as far as w
    dimensions show them.
    """
    short = grad_ab.shape[0]
    width = min(rank + OVERSAMPLING, short)
    gaussian_aw = torch.randn(short, width, generator=generator, device=grad_ab.device, dtype=grad_ab.dtype) / math.sqrt(short)
    left_aw = gaussian_aw  # its columns are nearly orthonormal
    if previous_ar is not None:
        old_ar = previous_ar[:, :width].to(grad_ab.dtype)
        old, fresh = gaussian_aw.split([old_ar.shape[1], width - old_ar.shape[1]], dim=1)
        left_aw = _nearly_orthonormal(torch.cat([old_ar.add(old, alpha=FRESH_PART), fresh], dim=1))
    for iteration in range(MOST_POWER_ITERATIONS):
        right_bw = grad_ab.mT @ (_nearly_orthonormal(left_aw) if iteration else left_aw)
        if not columns:
            right_bw = yield Sum(right_bw)
        gram_ww = _gram(right_bw)
        if columns:
            gram_ww = yield Sum(gram_ww)
        left_aw = yield Sum(grad_ab @ _nearly_orthonormal(right_bw, gram_ww))
        before, caught = gram_ww.trace(), left_aw.double().square().sum()
        if (yield OfFirst((caught - before <= SETTLED * caught).int())):
            break
    wide_aw = left_aw.double()
    energies, rotation_ww = torch.linalg.eigh(wide_aw.mT @ wide_aw)  # in fp64 a singular value of 1e-6 of the largest survives its square
    energies, rotation_wr = energies.flip(0)[:rank], rotation_ww.flip(1)[:, :rank]
    shown = energies > 1e-12 * energies[0]
    energies = energies.where(shown, 0.0)
    basis_ar = torch.where(shown, wide_aw @ rotation_wr / energies.sqrt(), gaussian_aw[:, :rank])  # any direction, where G has no more
    if energies[-1] <= 1e-8 * energies[0]:  # else the eigenvectors have made it orthonormal to 1e-7
        basis_ar = _orthonormal(basis_ar)
    return basis_ar.to(grad_ab.dtype), energies


def _gram(matrix_nw: Tensor) -> Tensor:
    wide_nw = matrix_nw.double()
    return wide_nw.mT @ wide_nw


def _nearly_orthonormal(matrix_nw: Tensor, gram_ww: Tensor | None = None) -> Tensor:
    """Columns of about the same span, far from parallel, none longer than 1: shifted Cholesky QR (Fukaya et al. 2020), all products.

    The shift keeps the factorisation from failing; directions of less than about a millionth of the matrix come out short. `gram` is the
    Gram matrix of all rows, where these are a part of them.
    """
    gram_ww = _gram(matrix_nw) if gram_ww is None else gram_ww.clone()
    gram_ww.diagonal().add_(1e-12 * gram_ww.trace())
    lower_ww = torch.linalg.cholesky_ex(gram_ww).L
    return torch.linalg.solve_triangular(lower_ww.mT, matrix_nw.double(), upper=True, left=False).to(matrix_nw.dtype)


def _orthonormal(columns_ar: Tensor) -> Tensor:
    """The columns after Gram-Schmidt, in fp64: by Cholesky QR, or by Householder QR, ten times slower, if they are nearly dependent."""
    columns_ar = columns_ar.double().contiguous()  # the other memory order takes four times as long to solve
    lower_rr, failed = torch.linalg.cholesky_ex(columns_ar.mT @ columns_ar)
    if failed or lower_rr.diagonal().amin() < 1e-4:
        return torch.linalg.qr(columns_ar).Q
    return torch.linalg.solve_triangular(lower_rr.mT, columns_ar, upper=True, left=False)
