"""Stochastic rounding to bf16: right on average, exact where it can be, safe at the edges, the same for equal seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ngpt.optim import AdamW
from ngpt.optim.rounding import counter_seed, generator_for, stochastic_round_


def rounded(exact: Tensor, *counters: int) -> Tensor:
    target = torch.empty(exact.shape, dtype=torch.bfloat16)
    stochastic_round_(target, exact, generator_for(exact.device, 0, *counters))
    return target


def test_the_mean_of_many_roundings_is_the_value() -> None:
    exact = torch.tensor([1.001, -1.003, 3.14159, 1e-20, -1234.5, 0.1])
    mean = rounded(exact.repeat(100_000, 1)).double().mean(0)
    unit = exact.abs().double() * 2**-8
    assert ((mean - exact.double()).abs() < 0.01 * unit).all()


def test_every_rounding_is_one_of_the_two_neighbours() -> None:
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    error = (rounded(exact).double() - exact.double()).abs()
    assert (error < exact.abs().double() * 2**-7).all()


def test_values_that_bf16_holds_stay() -> None:
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact[:4] = torch.tensor([0.0, -0.0, torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).tiny])
    assert torch.equal(rounded(exact.float()), exact)


def test_infinity_nan_and_the_largest_numbers_keep_their_kind() -> None:
    nan_bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)  # NaNs whose carry would be -0.0 or 0.0
    largest = torch.finfo(torch.float32).max
    exact = torch.cat([nan_bits, torch.tensor([float("inf"), float("-inf"), largest, -largest])])
    for counter in range(50):
        result = rounded(exact, counter).float()
        assert result[:3].isnan().all()
        assert result[3:5].tolist() == [float("inf"), float("-inf")]
        assert result[5:].isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    exact = torch.randn(shape)
    torch.testing.assert_close(rounded(exact).float(), exact, atol=0, rtol=2**-7)


def test_seeds_depend_on_every_counter_and_on_nothing_else() -> None:
    seeds = {
        counter_seed(seed, stream, index, step) for seed in range(5) for stream in range(2) for index in range(10) for step in range(50)
    }
    assert len(seeds) == 5 * 2 * 10 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    exact = torch.randn(1000)
    assert torch.equal(rounded(exact, 1, 2), rounded(exact, 1, 2))
    assert not torch.equal(rounded(exact, 1, 2), rounded(exact, 2, 1))


@pytest.mark.parametrize(("rounding", "moves"), [("stochastic", True), ("master", True), ("nearest", False)])
def test_updates_below_half_a_unit_are_lost_only_when_rounding_to_nearest(rounding: str, moves: bool) -> None:
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=1e-4, weight_decay=0.0, rounding=rounding)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    expected = 1 - 100 * 1e-4 if moves else 1.0
    assert weight.float().mean().item() == pytest.approx(expected, abs=2e-3 if moves else 0)
    if rounding == "master":
        assert optimizer.state[weight]["master"].mean().item() == pytest.approx(expected, abs=1e-5)
