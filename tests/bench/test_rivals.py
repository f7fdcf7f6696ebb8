"""Rivals against their papers' formulas, written out entry by entry in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench.rivals import APOLLO, FOAM, RACS, SCALE, PublishedFira, limit_growth_

GAMMA = 1.01


def gradients(shape: tuple[int, int], count: int = 4) -> list[np.ndarray]:
    """The second one is much larger than the first, so that the norm-growth limiter acts."""
    random = np.random.default_rng(0)
    return [random.normal(size=shape) * (10.0 if step == 1 else 1.0) for step in range(count)]


def trajectory(optimizer: type[torch.optim.Optimizer], shape: tuple[int, int], **options: object) -> list[np.ndarray]:
    """W before the first update and after each."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    instance = optimizer([weight], lr=0.1, **options)
    weights = [weight.detach().numpy().copy()]
    for grad in gradients(shape):
        weight.grad = torch.from_numpy(grad)
        instance.step()
        weights.append(weight.detach().numpy().copy())
    return weights


def limited(update: np.ndarray, last: float | None) -> tuple[np.ndarray, float]:
    norm = math.sqrt((update**2).sum())
    if last is not None and norm > GAMMA * last:
        update = update * (GAMMA * last / norm)
        norm = GAMMA * last
    return update, norm


def assert_updates(weights: list[np.ndarray], expected: list[np.ndarray], rate: float = 0.1) -> None:
    for before, after, update in zip(weights[:-1], weights[1:], expected, strict=True):
        np.testing.assert_allclose(after - before, -rate * update, rtol=1e-9, atol=1e-12)


def test_racs_scales_rows_and_columns_by_the_fixed_point_and_limits_growth() -> None:
    expected, last = [], None
    row = column = None
    for grad in gradients((3, 5)):
        q, s = np.ones(3), np.ones(5)
        for _ in range(5):
            s = np.array([sum(grad[i, j] ** 2 * q[i] for i in range(3)) for j in range(5)]) / (q @ q)
            q = np.array([sum(grad[i, j] ** 2 * s[j] for j in range(5)) for i in range(3)]) / (s @ s)
        row = q if row is None else 0.9 * row + 0.1 * q
        column = s if column is None else 0.9 * column + 0.1 * s
        update = np.array([[grad[i, j] / math.sqrt(row[i] * column[j]) for j in range(5)] for i in range(3)])
        update, last = limited(update, last)
        expected.append(update)
    assert_updates(trajectory(RACS, (3, 5)), expected)


def test_racs_makes_an_outer_product_of_magnitudes_all_ones() -> None:
    grad = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 4.0])).double()
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    weight.grad = grad
    RACS([weight], lr=1.0).step()
    torch.testing.assert_close(weight.data, -grad.sign())


def test_foam_is_adam_on_block_means_plus_what_they_leave_out() -> None:
    beta1, beta2, eps, block = 0.9, 0.95, 1e-6, 4
    first, second, expected = np.zeros((2, 2)), np.zeros((2, 2)), []
    for t, grad in enumerate(gradients((2, 8)), start=1):
        update = np.zeros((2, 8))
        for i in range(2):
            for b in range(2):
                entries = [grad[i, block * b + k] for k in range(block)]
                first[i, b] = beta1 * first[i, b] + (1 - beta1) * sum(entries) / block
                second[i, b] = beta2 * second[i, b] + (1 - beta2) * sum(x * x for x in entries) / block
                for k, x in enumerate(entries):
                    residual = x - sum(entries) / block
                    update[i, block * b + k] = (first[i, b] + residual) / (math.sqrt(second[i, b] + residual**2) + eps)
        expected.append(update * math.sqrt(1 - beta2**t) / (1 - beta1**t))
    assert_updates(trajectory(FOAM, (2, 8)), expected)


def test_foam_refuses_a_width_that_is_no_multiple_of_a_block() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 6))
    weight.grad = torch.ones(2, 6)
    with pytest.raises(ValueError, match="6 columns"):
        FOAM([weight], lr=0.1).step()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize(("per", "rank", "alpha"), [("channel", 2, 1.0), ("tensor", 1, 128.0)])
def test_apollo_scales_the_gradient_as_adam_scales_its_projection(shape: tuple[int, int], per: str, rank: int, alpha: float) -> None:
    beta1, beta2, eps, gap = 0.9, 0.99, 1e-6, 2
    options = {"rank": rank, "per": per, "alpha": alpha, "betas": (beta1, beta2), "eps": eps, "update_proj_gap": gap}
    short, long = min(shape), max(shape)
    first, second, expected, last = np.zeros((rank, long)), np.zeros((rank, long)), [], None
    for t, grad in enumerate(gradients(shape), start=1):
        flat = grad if shape[0] < shape[1] else grad.T
        generator = torch.Generator().manual_seed((t - 1) // gap)
        low = torch.randn(rank, short, generator=generator).double().numpy() / math.sqrt(rank) @ flat
        first = beta1 * first + (1 - beta1) * low
        second = beta2 * second + (1 - beta2) * low**2
        adam = first / (np.sqrt(second) + eps) * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        if per == "channel":
            scales = np.array([np.linalg.norm(adam[:, j]) / (np.linalg.norm(low[:, j]) + 1e-8) for j in range(long)])
        else:
            scales = np.full(long, np.linalg.norm(adam) / (np.linalg.norm(low) + 1e-8))
        update, last = limited(flat * scales, last)
        update = update * math.sqrt(alpha)
        expected.append(update if shape[0] < shape[1] else update.T)
    assert_updates(trajectory(APOLLO, shape, **options), expected)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_published_fira_adds_what_the_projection_dropped(shape: tuple[int, int]) -> None:
    beta1, beta2, eps, gap, rank, alpha = 0.9, 0.99, 1e-6, 100, 2, 0.25
    options = {"rank": rank, "alpha": alpha, "betas": (beta1, beta2), "eps": eps, "update_proj_gap": gap}
    first, second, expected, last, basis = 0.0, 0.0, [], None, None
    for t, grad in enumerate(gradients(shape), start=1):
        flat = grad if shape[0] < shape[1] else grad.T
        if basis is None:
            basis = np.linalg.svd(flat)[0][:, :rank]
        low = basis.T @ flat
        first = beta1 * first + (1 - beta1) * low
        second = beta2 * second + (1 - beta2) * low**2
        adam = first / (np.sqrt(second) + eps)
        phi = [np.linalg.norm(adam[:, j]) / (np.linalg.norm(low[:, j]) + 1e-8) for j in range(max(shape))]
        dropped, last = limited((flat - alpha * basis @ low) * np.array(phi), last)
        update = (alpha * basis @ adam + dropped) * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        expected.append(update if shape[0] < shape[1] else update.T)
    assert_updates(trajectory(PublishedFira, shape, **options), expected)


def test_apollo_keeps_no_projection() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    weight.grad = torch.ones(8, 16)
    optimizer = APOLLO([weight], lr=0.1, rank=2)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) == 2 * 2 * 16 + 1


def test_scale_gives_every_output_the_same_step() -> None:
    assert_updates(trajectory(SCALE, (3, 5)), [grad / np.sqrt((grad**2).mean(axis=1, keepdims=True)) for grad in gradients((3, 5))])


def test_the_scale_argument_multiplies_the_rate() -> None:
    np.testing.assert_allclose(trajectory(RACS, (3, 5), scale=0.5)[-1], 0.5 * trajectory(RACS, (3, 5))[-1])


def test_growth_is_limited_from_the_second_update_on() -> None:
    state = {"norm": torch.zeros(())}
    norms = [float(torch.linalg.vector_norm(limit_growth_(torch.full((4,), size), state))) for size in (1.0, 50.0, 0.5, 0.6)]
    assert norms == pytest.approx([2.0, 2.0 * GAMMA, 1.0, 1.0 * GAMMA])
