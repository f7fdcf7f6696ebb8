"""When a basis changes, from which gradients, and what becomes of moments and history."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from ngpt.optim import AdaRankGrad, GaLore, NaturalGaLore, low_rank
from ngpt.optim.low_rank import FIRST_TURNS
from ngpt.optim.rotation import change_of_basis, rotate_history_, rotate_moments
from ngpt.optim.sharding import Asking, alone

GAP = 4


def gradients(count: int, shape: tuple[int, int] = (6, 10), dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    for number in range(count):
        yield torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(dtype)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def refreshes_of(optimizer: torch.optim.Optimizer) -> list[int]:
    return [int(optimizer.state[p]["refreshes"]) for group in optimizer.param_groups for p in group["params"]]


# --------------------------------------------------------------------------------------------------------------- schedule
def test_without_stagger_every_basis_is_refreshed_every_gap_updates() -> None:
    weights = [nn.Parameter(torch.zeros(6, 10)) for _ in range(3)]
    optimizer = GaLore([{"params": weights, "rank": 2, "update_proj_gap": GAP}])
    seen = []
    for grad in gradients(10, dtype=torch.float32):
        for weight in weights:
            weight.grad = grad
        optimizer.step()
        seen.append(refreshes_of(optimizer))
    assert seen == [[1 + step // GAP] * 3 for step in range(10)]


@pytest.mark.parametrize(("matrices", "gap"), [(7, 100), (56, 200), (168, 200), (300, 50)])
def test_staggered_refreshes_are_spread_over_the_gap(matrices: int, gap: int) -> None:
    weights = [nn.Parameter(torch.zeros(2, 3)) for _ in range(matrices)]
    optimizer = NaturalGaLore([{"params": weights, "rank": 1, "update_proj_gap": gap}], fisher="none")
    per_update = []
    for step in range(FIRST_TURNS, FIRST_TURNS + gap):
        for weight in weights:
            optimizer.state[weight]["step"].fill_(step)
        per_update.append(sum(optimizer._refresh_is_due(weight) for weight in weights))
    assert sum(per_update) == matrices
    assert max(per_update) <= -(-matrices // gap) + 1


@pytest.mark.parametrize("gap", [3, 7, 200])
def test_the_first_search_comes_within_twenty_updates_or_a_gap_and_until_then_axes_serve(gap: int) -> None:
    weights = [nn.Parameter(torch.zeros(6, 10)) for _ in range(30)]
    optimizer = NaturalGaLore([{"params": weights, "rank": 2, "update_proj_gap": gap}], fisher="none")
    searched: list[list[bool]] = []
    for grad in gradients(min(gap, FIRST_TURNS), dtype=torch.float32):
        for weight in weights:
            weight.grad = grad.clone()
        optimizer.step()
        for weight in weights:
            basis = optimizer.state[weight]["basis"]
            torch.testing.assert_close(basis.T @ basis, torch.eye(2))
        searched.append([bool((optimizer.state[weight]["basis"].count_nonzero(dim=0) > 1).all()) for weight in weights])
    per_update = [sum(now) - sum(before) for before, now in zip([[False] * 30, *searched], searched, strict=False)]
    assert all(searched[-1])
    assert max(per_update) <= -(-30 // min(gap, FIRST_TURNS)) + 1


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("method", [GaLore, NaturalGaLore])
def test_a_gradient_without_direction_never_chooses_a_basis(method: Callable, bad: float) -> None:
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = method([{"params": [weight], "rank": 2, "update_proj_gap": 1}])
    reduced = optimizer.reduce_gradient(weight, torch.full((6, 10), bad))
    optimizer.drop_gradient(weight)
    assert reduced.isfinite().all() == (bad == 0)
    assert optimizer.state[weight]["refreshes"] == 0
    assert not optimizer.state[weight]["basis"].any()


def test_a_zero_gradient_moves_nothing_and_the_next_one_gets_a_basis() -> None:
    weight = nn.Parameter(torch.ones(6, 10))
    optimizer = NaturalGaLore([{"params": [weight], "rank": 2, "update_proj_gap": 100}], fisher="history")
    for expected, grad in ((0, torch.zeros(6, 10)), (0, torch.zeros(6, 10)), (1, torch.randn(6, 10)), (1, torch.randn(6, 10))):
        before = weight.detach().clone()
        weight.grad = grad
        optimizer.step()
        assert optimizer.state[weight]["refreshes"] == expected
        assert torch.equal(before, weight.detach()) == (not grad.any())


def test_a_zero_gradient_at_a_refresh_leaves_the_old_basis() -> None:
    weight = nn.Parameter(torch.ones(6, 10))
    optimizer = GaLore([{"params": [weight], "rank": 2, "update_proj_gap": 2}], on_refresh="reset")
    for grad in (torch.randn(6, 10), torch.randn(6, 10), torch.zeros(6, 10)):
        weight.grad = grad
        optimizer.step()
    assert optimizer.state[weight]["refreshes"] == 1
    assert optimizer.state[weight]["exp_avg"].any()


@pytest.mark.parametrize("subspace", ["svd", "randomized", "random"])
def test_a_basis_that_waits_for_its_update_keeps_no_more_than_itself(subspace: str) -> None:
    """Not all the singular vectors of which it is a part: in deferred per-layer updates the bases of all matrices wait together."""
    weight = nn.Parameter(torch.zeros(12, 16))
    for method in (GaLore, AdaRankGrad):
        optimizer = method([{"params": [weight], "rank": 5}], subspace=subspace, stagger=False)
        optimizer.reduce_gradient(weight, torch.outer(torch.ones(12), torch.ones(16)))
        for basis in optimizer._fresh_bases[weight]:
            assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


def test_a_dropped_refresh_leaves_no_trace() -> None:
    weight = nn.Parameter(torch.ones(6, 10))
    optimizer = NaturalGaLore([{"params": [weight], "rank": 2, "update_proj_gap": 1}], fisher="history")
    weight.grad = torch.randn(6, 10)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    grad = torch.randn(6, 10)
    with_new_basis = optimizer.reduce_gradient(weight, grad)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[weight].items())
    assert torch.equal(optimizer.reduce_gradient(weight, 2 * grad, first=False), 2 * with_new_basis)
    optimizer.drop_gradient(weight)
    torch.testing.assert_close(optimizer.reduce_gradient(weight, grad, first=False), before["basis"].T @ grad)


# --------------------------------------------------------------------------------------------------------------- rotation
def test_rotating_within_the_same_subspace_keeps_momentum_and_scale() -> None:
    old = orthonormal(8, 3, seed=0)
    turn = orthonormal(3, 3, seed=1)
    new = old @ turn
    first, second = orthonormal(5, 3, seed=2).T.contiguous(), torch.rand(3, 5, dtype=torch.float64)
    rotated, _ = rotate_moments(change_of_basis(new, old), first, second, (0.9, 0.99), 10)
    torch.testing.assert_close(new @ rotated, old @ first)


def test_the_second_moment_follows_the_formula_of_ldadam_and_never_turns_negative() -> None:
    torch.manual_seed(0)
    change = torch.randn(3, 4, dtype=torch.float64) / 2
    first, second = torch.randn(4, 5, dtype=torch.float64), 0.02 * torch.rand(4, 5, dtype=torch.float64)
    b1, b2, t = 0.9, 0.99, 7
    _, rotated = rotate_moments(change, first, second, (b1, b2), t)
    expected = torch.empty(3, 5, dtype=torch.float64)
    for i in range(3):
        for j in range(5):
            variance = sum(change[i, q] ** 2 * (second[q, j] / (1 - b2**t) - (first[q, j] / (1 - b1**t)) ** 2) for q in range(4))
            mean = sum(change[i, q] * first[q, j] / (1 - b1**t) for q in range(4))
            expected[i, j] = (1 - b2**t) * abs(variance + mean**2)
    torch.testing.assert_close(rotated, expected)
    assert (rotated >= 0).all()


def test_every_remembered_gradient_is_rotated() -> None:
    history, change = torch.randn(4, 3 * 5), torch.randn(3, 3)
    expected = torch.stack([(change @ row.view(3, 5)).reshape(-1) for row in history])
    rotate_history_(change, history)
    torch.testing.assert_close(history, expected)


# --------------------------------------------------------------------------------------------------- what a refresh does
PARTS = {
    "no Fisher": {"fisher": "none"},
    "history": {"fisher": "history", "history": 5},
    "two-sided": {"fisher": "two_sided", "history": 5},
    "two-sided GaLore": {"fisher": "none", "proj_type": "full"},
    "factored": {"fisher": "factored"},
    "diagonal": {"fisher": "diagonal"},
    "diagonal without complement": {"fisher": "diagonal", "complement": "none"},
    "factored second moment": {"fisher": "none", "moments": "adafactor"},
    "momentum": {"fisher": "none", "moments": "momentum"},
    "complement": {"fisher": "none", "complement": "fira"},
    "factored, complement": {"fisher": "factored", "complement": "fira"},
}


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("subspace", ["svd", "randomized"])
@pytest.mark.parametrize(("on_refresh", "independent"), [("rotate", True), ("reset", True), ("keep", False)])
def test_signs_of_singular_vectors_change_nothing_under_rotate(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], parts: dict, subspace: str, on_refresh: str, independent: bool
) -> None:
    def run(flip: bool) -> Tensor:
        counter = iter(range(1000))

        def with_signs(basis: Tensor) -> Tensor:
            signs = torch.randint(0, 2, (3,), generator=torch.Generator().manual_seed(next(counter))) * 2 - 1
            return basis * signs if flip else basis

        def find(*args: object, **kwargs: object) -> tuple[Tensor, Tensor] | None:
            basis, energies = find_whole(*args, **kwargs)
            return with_signs(basis), energies

        def search(*args: object, **kwargs: object) -> Asking[tuple[Tensor, Tensor]]:
            basis, energies = yield from search_thin(*args, **kwargs)
            return with_signs(basis), energies

        monkeypatch.setattr(low_rank, "basis_and_energies", find)
        monkeypatch.setattr(low_rank, "search_basis", search)
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        group = {"params": [weight], "rank": 3, "update_proj_gap": GAP}
        optimizer = NaturalGaLore([group], subspace=subspace, on_refresh=on_refresh, lr=0.1, **parts)
        for grad in gradients(12, shape):
            weight.grad = grad
            optimizer.step()
        return weight.detach()

    find_whole, search_thin = low_rank.basis_and_energies, low_rank.search_basis
    difference = (run(flip=False) - run(flip=True)).abs().max()
    assert (difference < 1e-6) == independent


def one_refresh(on_refresh: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State before and after the update that refreshes, whose gradient is tiny so that it adds nothing."""
    weight = nn.Parameter(torch.zeros(6, 10, dtype=torch.float64))
    optimizer = NaturalGaLore(
        [{"params": [weight], "rank": 3, "update_proj_gap": GAP}], fisher="history", history=6, on_refresh=on_refresh, stagger=False
    )
    for grad in gradients(GAP):
        weight.grad = grad
        optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    grad = next(gradients(1)).flip(0)
    alone(optimizer._begin_update(weight, optimizer.reduce_gradient(weight, grad), None))
    return before, optimizer.state[weight]


def test_rotate_carries_moments_and_history_into_the_new_basis() -> None:
    before, after = one_refresh("rotate")
    change = after["basis"].T @ before["basis"]
    torch.testing.assert_close(after["exp_avg"], change @ before["exp_avg"])
    rotated = torch.stack([(change @ row.view(3, 10)).reshape(-1) for row in before["history"]])
    torch.testing.assert_close(after["history"], rotated)
    torch.testing.assert_close(after["gram"], rotated @ rotated.T)


def test_keep_leaves_moments_and_history_as_they_are() -> None:
    before, after = one_refresh("keep")
    assert not torch.equal(before["basis"], after["basis"])
    assert all(torch.equal(before[key], after[key]) for key in ("exp_avg", "exp_avg_sq", "history", "gram"))


def test_reset_clears_moments_and_history_and_restarts_the_bias_correction() -> None:
    _, after = one_refresh("reset")
    assert not any(after[key].any() for key in ("exp_avg", "exp_avg_sq", "history", "gram"))
    assert after["cleared_at"] == GAP


def test_after_a_reset_the_step_is_that_of_a_new_run() -> None:
    weight, fresh = nn.Parameter(torch.zeros(6, 10)), nn.Parameter(torch.zeros(6, 10))
    options = {"on_refresh": "reset", "lr": 0.1}
    old = GaLore([{"params": [weight], "rank": 2, "update_proj_gap": GAP}], **options)
    for grad in gradients(GAP, dtype=torch.float32):
        weight.grad = grad
        old.step()
    before = weight.detach().clone()
    new = GaLore([{"params": [fresh], "rank": 2, "update_proj_gap": GAP}], **options)
    for grad in gradients(3, dtype=torch.float32):
        weight.grad, fresh.grad = grad.clone(), grad.clone()
        old.step()
        new.step()
        torch.testing.assert_close(weight.detach() - before, fresh.detach(), atol=1e-6, rtol=0)
