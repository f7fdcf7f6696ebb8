"""A subspace is a space, not a basis: which methods do not depend on how its columns are turned, and which theory allows to.

Under `on_refresh="rotate"`. One Adam coordinate is one column, so Adam may depend on everything but order and signs of columns;
momentum, and every Fisher in the subspace, are the same in any orthonormal basis.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ngpt.optim import NaturalGaLore, low_rank

RANK, GAP = 3, 4
FISHERS = {
    "none": {"fisher": "none"},
    "two-sided": {"fisher": "none", "proj_type": "full"},
    "fira": {"fisher": "none", "complement": "fira"},
    "history": {"fisher": "history", "history": 5},
    "history, fira": {"fisher": "history", "history": 5, "complement": "fira"},
    "two-sided history": {"fisher": "two_sided", "history": 5},
    "factored": {"fisher": "factored"},
    "factored, fira": {"fisher": "factored", "complement": "fira"},
}
DIAGONAL = {"diagonal": {"fisher": "diagonal"}, "diagonal, no complement": {"fisher": "diagonal", "complement": "none"}}
Turn = Callable[[torch.Generator], Tensor]


def signs(generator: torch.Generator) -> Tensor:
    return torch.diag(torch.randint(0, 2, (RANK,), generator=generator).mul(2).sub(1).double())


def permutation(generator: torch.Generator) -> Tensor:
    return torch.eye(RANK, dtype=torch.float64)[torch.randperm(RANK, generator=generator)]


def rotation(generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)).Q


def difference(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], parts: dict, turn: Turn) -> float:
    """Largest difference of weights after three refreshes if every basis that is found is turned, each differently."""
    find_basis = low_rank.basis_and_energies

    def run(turned: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)

        def find(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
            basis, energies = find_basis(*args, **kwargs)
            return (basis @ turn(generator) if turned else basis), energies

        monkeypatch.setattr(low_rank, "basis_and_energies", find)
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP}
        optimizer = NaturalGaLore([group], lr=0.1, scale=1.0, subspace="svd", stagger=False, on_refresh="rotate", **parts)
        for number in range(3 * GAP):
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            optimizer.step()
        return weight.detach()

    result = float((run(turned=False) - run(turned=True)).abs().max())
    monkeypatch.setattr(low_rank, "basis_and_energies", find_basis)
    return result


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("parts", [parts | {"moments": "momentum"} for parts in FISHERS.values()] + list(DIAGONAL.values()), ids=str)
def test_momentum_does_not_see_the_basis(monkeypatch: pytest.MonkeyPatch, parts: dict, shape: tuple[int, int]) -> None:
    assert difference(monkeypatch, shape, parts, rotation) < 1e-8


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
@pytest.mark.parametrize("parts", FISHERS.values(), ids=str)
def test_adam_does_not_see_order_and_signs_of_columns_but_sees_rotations(monkeypatch: pytest.MonkeyPatch, parts: dict, kind: str) -> None:
    for turn in (signs, permutation):
        assert difference(monkeypatch, (6, 10), parts | {"moments": kind}, turn) < 1e-6
    assert difference(monkeypatch, (6, 10), parts | {"moments": kind}, rotation) > 1e-3
