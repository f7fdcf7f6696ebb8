"""Bases: orthonormal, ordered, catching the energy of the gradient, from a seed alone, and never from a gradient without direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ngpt.optim.projection import (
    basis_and_energies,
    cheap_basis,
    find_basis,
    lift_onto_,
    project,
    random_basis,
    randomized_range,
    short_side_first,
)
from ngpt.optim.rounding import generator_for
from ngpt.optim.sharding import alone


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
    basis = alone(randomized_range(grad, rank, previous, generator_for(grad.device, 0)))[0]
    exact = torch.linalg.svd(grad).U[:, :rank]
    assert energy(basis, grad) >= 0.98 * energy(exact, grad)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)


def test_columns_come_in_the_order_of_their_singular_values() -> None:
    grad = decaying_matrix(40, 60, 1.0)
    exact = torch.linalg.svd(grad).U[:, :5]
    basis = alone(randomized_range(grad, 5, None, generator_for(grad.device, 0)))[0]
    torch.testing.assert_close((basis * exact).sum(0).abs(), torch.ones(5), atol=1e-2, rtol=0)


def test_a_useless_old_basis_does_not_hide_new_directions() -> None:
    grad = torch.zeros(20, 30)
    grad[10:14] = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    old = torch.eye(20)[:, :4]
    basis = alone(randomized_range(grad, 4, old, generator_for(grad.device, 0)))[0]
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


@pytest.mark.parametrize("subspace", ["svd", "randomized", "random"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
def test_no_basis_from_a_gradient_without_direction(subspace: str, value: float) -> None:
    grad = torch.zeros(6, 9)
    grad[2, 3] = value
    assert find_basis(grad, 2, subspace=subspace, previous_ar=None, generator=generator_for(grad.device, 0)) is None
    assert cheap_basis(grad, 2) is None


def test_a_gradient_of_lower_rank_than_the_basis_still_gives_an_orthonormal_one() -> None:
    grad = torch.outer(torch.randn(12), torch.randn(20))
    for subspace in ("svd", "randomized"):
        basis = find_basis(grad, 5, subspace=subspace, previous_ar=None, generator=generator_for(grad.device, 0))
        assert basis is not None
        torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-5, rtol=0)
        assert energy(basis, grad) == pytest.approx(float(grad.norm() ** 2), rel=1e-5)


def awkward_gradients() -> dict[str, Tensor]:
    """Gradients (24, 40) on which a factorisation that squares, divides or trusts its input goes wrong."""
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(24, 40, generator=generator)
    left, right = torch.linalg.qr(full).Q, torch.linalg.qr(torch.randn(40, 24, generator=generator)).Q
    padded = full.clone()
    padded[5:], padded[:, 20:] = 0, 0
    one_entry = torch.zeros(24, 40)
    one_entry[7, 3] = -2.0
    return {
        "rank 1": torch.outer(full[:, 0], full[0]),
        "rank 1, all equal": torch.ones(24, 40),
        "one entry": one_entry,
        "zero rows and columns": padded,
        "repeated rows": full[:3].repeat(8, 1),
        "equal singular values": left @ right.T,
        "singular values down to 1e-12": left * torch.logspace(0, -12, 24) @ right.T,
        "two singular values far above the rest": left * torch.tensor([1e8, 1e8] + [1.0] * 22) @ right.T,
        "tiny": full * 1e-38,
        "huge": full * 1e37,
        "one huge entry": torch.where(one_entry != 0, 1e30, full),
        "transposed": full.T.contiguous().T,
        "bf16": full.bfloat16(),
        "fp64": full.double(),
    }


@pytest.mark.parametrize("kind", awkward_gradients())
@pytest.mark.parametrize("rank", [1, 6, 20, 23])
@pytest.mark.parametrize("start", ["svd", "random", "cold", "from a useless basis", "from a basis of smaller rank", "rows"])
def test_a_basis_is_orthonormal_whatever_the_gradient(kind: str, rank: int, start: str) -> None:
    grad = awkward_gradients()[kind]
    generator = generator_for(grad.device, 2)
    previous = {"from a useless basis": torch.eye(24)[:, 24 - rank :], "from a basis of smaller rank": torch.eye(24)[:, : rank // 2]}
    if start == "rows":
        basis = cheap_basis(grad, rank)
    else:
        subspace = start if start in ("svd", "random") else "randomized"
        basis = find_basis(grad, rank, subspace=subspace, previous_ar=previous.get(start), generator=generator)
    assert basis is not None
    assert basis.dtype == torch.promote_types(grad.dtype, torch.float32)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=basis.dtype), atol=1e-5, rtol=0)
    if start not in ("random", "rows"):
        exact = torch.linalg.svdvals(grad.double())[:rank].square().sum()
        caught = (basis.double().T @ grad.double()).square().sum()
        assert caught >= 0.98 * exact


@pytest.mark.parametrize("subspace", ["svd", "randomized", "random"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_energies_are_the_shares_that_the_columns_catch(subspace: str, size: float) -> None:
    grad = decaying_matrix(40, 60, 1.0)
    found = basis_and_energies(grad * size, 12, subspace=subspace, previous_ar=None, generator=generator_for(grad.device, 0))
    assert found is not None
    basis, energies = found
    expected = (basis.T @ grad).square().sum(1) / grad.square().sum()
    torch.testing.assert_close(energies, expected, atol=2e-3, rtol=0.05)
    assert torch.equal(energies, energies.sort(descending=True).values)


def test_energies_end_where_the_gradient_does() -> None:
    grad = torch.zeros(30, 50)
    grad[4:7] = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for subspace in ("svd", "randomized"):
        found = basis_and_energies(grad, 9, subspace=subspace, previous_ar=None, generator=generator_for(grad.device, 0))
        assert found is not None
        assert float(found[1].sum()) == pytest.approx(1, abs=1e-5)
        assert float(found[1][3:].sum()) == pytest.approx(0, abs=1e-6)


def test_a_larger_old_basis_is_cut_to_the_rank() -> None:
    grad = decaying_matrix(40, 60, 1.0)
    old = torch.linalg.svd(grad).U[:, :30]
    assert alone(randomized_range(grad, 5, old, generator_for(grad.device, 0)))[0].shape == (40, 5)


def test_random_bases_do_not_look_at_the_gradient_and_are_spread_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = torch.stack([random_basis(torch.full((6, 9), torch.nan), 2, generator) for _ in range(4000)])
    # Uniform on the Stiefel manifold: each entry has mean 0 and variance 1/a, and P P' has the mean (r/a) I.
    torch.testing.assert_close(bases.mean(0), torch.zeros(6, 2), atol=0.03, rtol=0)
    torch.testing.assert_close((bases @ bases.mT).mean(0), torch.eye(6) * 2 / 6, atol=0.02, rtol=0)


def test_the_cheap_basis_takes_the_rows_of_largest_energy_the_first_of_equal_ones() -> None:
    grad = torch.zeros(5, 8)
    grad[3, :2], grad[1, 0], grad[4, 0], grad[0, 0] = 1.0, -1.2, 1.2, 0.1
    basis = cheap_basis(grad * 1e-30, 3)
    assert basis is not None
    assert torch.equal(basis, torch.eye(5)[:, [3, 1, 4]])


def test_equal_seeds_give_equal_bases() -> None:
    grad = decaying_matrix(16, 24, 0.5)
    bases = [alone(randomized_range(grad, 3, None, generator_for(grad.device, 5, 1, seed)))[0] for seed in (2, 2, 3)]
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
