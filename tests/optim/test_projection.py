"""Bases: orthonormal, ordered, catching the energy of the gradient, from a seed alone, and never from a gradient without direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ngpt.optim.projection import find_basis, lift_onto_, project, randomized_basis, short_side_first
from ngpt.optim.rounding import generator_for


def decaying_matrix(short: int, long: int, decay: float, seed: int = 0) -> Tensor:
    """Random singular vectors, singular values 1, 1/2^decay, 1/3^decay, ... : the shape of the spectrum of real gradients."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(short, short, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(long, short, generator=generator)).Q
    return left * torch.arange(1, short + 1).float().pow(-decay) @ right.T


def energy(basis: Tensor, grad: Tensor) -> float:
    return float((basis.T @ grad).norm() ** 2)


def test_a_square_matrix_counts_as_tall() -> None:
    assert short_side_first(torch.zeros(3, 5)).shape == (3, 5)
    assert short_side_first(torch.zeros(5, 3)).shape == (3, 5)
    square = torch.arange(9.0).view(3, 3)
    assert torch.equal(short_side_first(square), square.T)


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("rank", [4, 32])
def test_the_randomized_basis_catches_the_energy_of_the_exact_one(decay: float, warm: bool, rank: int) -> None:
    grad = decaying_matrix(128, 300, decay)
    previous = None
    if warm:  # from the basis of an older gradient that shares a part with this one
        previous = torch.linalg.svd(grad + decaying_matrix(128, 300, decay, seed=5)).U[:, :rank]
    basis = randomized_basis(grad, rank, previous, generator_for(grad.device, 0))
    exact = torch.linalg.svd(grad).U[:, :rank]
    assert energy(basis, grad) >= 0.98 * energy(exact, grad)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)


def test_columns_come_in_the_order_of_their_singular_values() -> None:
    grad = decaying_matrix(40, 60, 1.0)
    exact = torch.linalg.svd(grad).U[:, :5]
    basis = randomized_basis(grad, 5, None, generator_for(grad.device, 0))
    torch.testing.assert_close((basis * exact).sum(0).abs(), torch.ones(5), atol=1e-2, rtol=0)


def test_a_useless_old_basis_does_not_hide_new_directions() -> None:
    grad = torch.zeros(20, 30)
    grad[10:14] = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    old = torch.eye(20)[:, :4]
    basis = randomized_basis(grad, 4, old, generator_for(grad.device, 0))
    assert energy(basis, grad) >= 0.999 * float(grad.norm() ** 2)


@pytest.mark.parametrize("subspace", ["svd", "randomized"])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_a_basis_does_not_depend_on_the_size_of_the_gradient(subspace: str, size: float) -> None:
    grad = decaying_matrix(16, 24, 1.0)
    bases = [
        find_basis(grad * factor, 3, subspace=subspace, previous_ar=None, generator=generator_for(grad.device, 1)) for factor in (1.0, size)
    ]
    assert bases[0] is not None
    assert bases[1] is not None
    torch.testing.assert_close(bases[0] @ bases[0].T, bases[1] @ bases[1].T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("subspace", ["svd", "randomized"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
def test_no_basis_from_a_gradient_without_direction(subspace: str, value: float) -> None:
    grad = torch.zeros(6, 9)
    grad[2, 3] = value
    assert find_basis(grad, 2, subspace=subspace, previous_ar=None, generator=generator_for(grad.device, 0)) is None


def test_a_gradient_of_lower_rank_than_the_basis_still_gives_an_orthonormal_one() -> None:
    grad = torch.outer(torch.randn(12), torch.randn(20))
    for subspace in ("svd", "randomized"):
        basis = find_basis(grad, 5, subspace=subspace, previous_ar=None, generator=generator_for(grad.device, 0))
        assert basis is not None
        torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-5, rtol=0)
        assert energy(basis, grad) == pytest.approx(float(grad.norm() ** 2), rel=1e-5)


def test_equal_seeds_give_equal_bases() -> None:
    grad = decaying_matrix(16, 24, 0.5)
    bases = [randomized_basis(grad, 3, None, generator_for(grad.device, 5, 1, seed)) for seed in (2, 2, 3)]
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16])
def test_what_is_projected_and_lifted_is_the_projection_of_the_gradient(shape: tuple[int, int], basis_dtype: torch.dtype) -> None:
    grad, weight = torch.randn(shape), torch.randn(shape)
    short = min(shape)
    basis = torch.linalg.qr(torch.randn(short, 3)).Q.to(basis_dtype)
    before = weight.clone()
    lift_onto_(short_side_first(weight), basis, project(short_side_first(grad), basis).float(), -0.5)
    projector = basis.float() @ basis.float().T
    expected = projector @ grad if shape[0] < shape[1] else grad @ projector
    torch.testing.assert_close(weight, before - 0.5 * expected, atol=1e-5 if basis_dtype == torch.float32 else 3e-2, rtol=0)
