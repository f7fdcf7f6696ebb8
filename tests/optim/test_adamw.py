"""AdamW equals torch's, and behaves like a torch optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups, storage


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_adamw_to_the_last_bit(make_network, train, identical, weight_decay: float, dtype: torch.dtype) -> None:
    ours, theirs = make_network(dtype), make_network(dtype)
    arguments = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    train(ours, AdamW(ours.parameters(), **arguments), range(20))
    train(theirs, torch.optim.AdamW(theirs.parameters(), foreach=False, **arguments), range(20))
    assert identical(ours, theirs)


@pytest.mark.parametrize("method", [GaLore, NaturalGaLore])
def test_groups_without_rank_are_plain_adamw(make_network, train, identical, method: Callable) -> None:
    ours, theirs = make_network(), make_network()
    arguments = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    train(ours, method(ours.parameters(), **arguments), range(10))
    train(theirs, torch.optim.AdamW(theirs.parameters(), foreach=False, **arguments), range(10))
    assert identical(ours, theirs)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], weight_decay=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3))
    assert optimizer.state[unused]["step"] == 0
    assert optimizer.state[used]["step"] == 1


def test_a_closure_is_called_with_gradients_enabled() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert optimizer.step(closure) < 3.0


def test_learning_rate_schedulers_of_torch_set_the_rate() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = AdamW([weight], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][step])
    positions = [0.0]
    for _ in range(3):
        weight.grad = torch.ones(1)
        optimizer.step()
        positions.append(weight.item())
        if len(positions) < 4:
            scheduler.step()
    moves = [before - after for before, after in itertools.pairwise(positions)]
    assert moves == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


def test_sparse_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = AdamW(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="weight: sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_one_row_and_one_column_matrices_are_updated_unprojected(shape: tuple[int, int]) -> None:
    ours, theirs = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    mine = GaLore([{"params": [ours], "rank": "full"}], lr=0.1, scale=1.0, eps=1e-12)
    reference = torch.optim.AdamW([theirs], lr=0.1, eps=1e-12, weight_decay=0.0)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_non_contiguous_gradients_and_weights(make_network) -> None:
    for shape in ((6, 9), (9, 6)):
        plain = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        strided = nn.Parameter(plain.detach().clone().mT.contiguous().mT)
        optimizers = [NaturalGaLore([{"params": [p], "rank": 2}], lr=0.1, update_proj_gap=2) for p in (plain, strided)]
        for number in range(5):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            plain.grad, strided.grad = grad, grad.mT.contiguous().mT
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(plain, strided, atol=1e-5, rtol=1e-5)


def test_any_module_learns_in_twenty_lines() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    teacher = nn.Linear(16, 4)
    optimizer = NaturalGaLore(low_rank_groups(model, rank=3, update_proj_gap=20, scale=1.0), lr=0.003)
    losses = []
    for _ in range(200):
        inputs = torch.randn(64, 16)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_updating_a_weight_in_pieces_changes_nothing(
    make_network, train, identical, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rounding: str
) -> None:
    whole, pieces = make_network(dtype), make_network(dtype)
    train(whole, AdamW(whole.parameters(), lr=0.01, rounding=rounding), range(5))
    monkeypatch.setattr(storage, "PIECE_ELEMENTS", {"cpu": 40})
    train(pieces, AdamW(pieces.parameters(), lr=0.01, rounding=rounding), range(5))
    assert identical(whole, pieces)
