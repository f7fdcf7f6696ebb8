"""Every combination of parts equals its formulas written out in float64 with explicit full-size matrices and dense solves."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ngpt.optim import AdaRankGrad, GaLore, NaturalGaLore, complement, diagonal_fisher, factored_fisher

LR, BETA1, BETA2, EPS, SCALE, DECAY, DAMPING, RANK, GAP, HISTORY = 0.02, 0.8, 0.95, 1e-6, 0.5, 0.1, 0.03, 3, 4, 5
COMBINATIONS = [
    {"fisher": fisher, "moments": kind, "complement": extra, "proj_type": sides}
    for fisher, kind, extra, sides in itertools.product(
        ("none", "history", "two_sided", "factored"), ("adam", "adafactor", "momentum"), ("none", "fira"), ("std", "full")
    )
    if (sides == "std" or (fisher in ("none", "history") and extra == "none")) and not (fisher == "two_sided" and extra == "fira")
] + [{"fisher": "diagonal", "moments": "momentum", "complement": extra, "proj_type": "std"} for extra in ("none", "raw")]


class Written:
    """One matrix, short side first, updated as the docstrings and their sources say; numpy, nothing shared with the library."""

    def __init__(self, weight: np.ndarray, parts: dict[str, str], on_refresh: str, root_interval: int) -> None:
        self.parts, self.on_refresh, self.root_interval = parts, on_refresh, root_interval
        self.weight, self.updates, self.norm = weight.copy(), 0, 0.0
        self.left = self.right = None
        self.p = self.q = 0.0
        self.clear()

    def clear(self) -> None:
        self.age, self.first, self.second, self.rows, self.columns = 0, 0.0, 0.0, 0.0, 0.0
        self.history: list[np.ndarray] = []
        self.factor: Any = 0.0

    def refresh(self, left: np.ndarray, right: np.ndarray) -> None:
        if self.left is not None and self.on_refresh == "reset":
            self.clear()
        if self.left is not None and self.on_refresh == "rotate":
            turn_left, turn_right = left.T @ self.left, (right.T @ self.right if self.two_sided else np.eye(len(right)))
            mean, square = self.first / (1 - BETA1**self.age), self.second / (1 - BETA2**self.age)
            for turn in (turn_left, turn_right):
                turned = turn @ mean
                square, mean = np.abs(turn**2 @ (square - mean**2) + turned**2).T, turned.T
            self.first, self.second = mean * (1 - BETA1**self.age), square * (1 - BETA2**self.age)
            if self.parts["moments"] == "adafactor":
                left_rows, left_columns = turn_left**2 @ self.rows, turn_right**2 @ self.columns
                kept = np.mean(left_columns) / np.mean(self.columns)  # by the long side
                self.rows = kept * left_rows
                self.columns = left_columns * np.mean(self.rows) / np.mean(left_columns)
            self.history = [turn_left @ old @ turn_right.T for old in self.history]
            if np.ndim(self.factor):
                unknown = np.eye(RANK) - turn_left @ turn_left.T
                self.factor = turn_left @ self.factor @ turn_left.T + np.trace(self.factor) / RANK * unknown
            self.find_root()
        self.left, self.right = left, right

    @property
    def two_sided(self) -> bool:
        return self.parts["proj_type"] == "full" or self.parts["fisher"] == "two_sided"

    def find_root(self) -> None:
        if np.ndim(self.factor):
            unbiased = self.factor / (1 - BETA2**self.age)
            values, vectors = np.linalg.eigh(unbiased + DAMPING * np.trace(unbiased) / RANK * np.eye(RANK))
            self.root = vectors @ np.diag(values**-0.5) @ vectors.T

    def natural(self, low: np.ndarray) -> np.ndarray:
        if self.parts["fisher"] in ("history", "two_sided"):
            self.history = [*self.history, low][-HISTORY:]
            stacked = np.stack([old.ravel() for old in self.history], axis=1)
            return np.linalg.solve(DAMPING * np.eye(low.size) + stacked @ stacked.T, low.ravel()).reshape(low.shape)
        if self.parts["fisher"] == "factored":
            self.factor = BETA2 * self.factor + (1 - BETA2) * low @ low.T / low.shape[1]
            if self.updates % self.root_interval == 0:
                self.find_root()
            elif self.age == 1:
                self.root = np.eye(RANK) / np.sqrt(np.trace(self.factor) / (1 - BETA2) / RANK)
            return self.root @ low
        return low

    def direction(self, low: np.ndarray) -> np.ndarray:
        self.first = BETA1 * self.first + (1 - BETA1) * low
        if self.parts["moments"] == "momentum":
            return self.first / (1 - BETA1**self.age)
        if self.parts["moments"] == "adam":
            self.second = BETA2 * self.second + (1 - BETA2) * low**2
            second = self.second
        else:
            self.rows = BETA2 * self.rows + (1 - BETA2) * (low**2).mean(1)
            self.columns = BETA2 * self.columns + (1 - BETA2) * (low**2).mean(0)
            second = np.outer(self.rows, self.columns) / self.rows.mean()
        return np.sqrt(1 - BETA2**self.age) / (1 - BETA1**self.age) * self.first / (np.sqrt(second) + EPS)

    def limited(self, update: np.ndarray) -> np.ndarray:
        norm = np.linalg.norm(update)
        if self.norm > 0 and norm > 1.01 * self.norm:
            update = update * 1.01 * self.norm / norm
        self.norm = np.linalg.norm(update)
        return update

    def step(self, grad: np.ndarray) -> None:
        low = self.left.T @ grad @ (self.right if self.two_sided else np.eye(grad.shape[1]))
        self.age, self.updates = self.age + 1, self.updates + 1
        direction = self.direction(self.natural(low))
        lifted = self.left @ direction @ (self.right.T if self.two_sided else np.eye(grad.shape[1]))
        dropped = grad - self.left @ self.left.T @ grad
        if self.parts["fisher"] == "diagonal":
            self.p = BETA2 * self.p + (1 - BETA2) * (grad**2).mean(1)
            self.q = BETA2 * self.q + (1 - BETA2) * (grad**2).mean(0)
            p, q = self.p / (1 - BETA2**self.updates), self.q / (1 - BETA2**self.updates)
            scales = np.sqrt(p.mean() / np.outer(p + DAMPING * p.mean(), q + DAMPING * q.mean()))
            lifted = self.limited(scales * (lifted + (dropped if self.parts["complement"] == "raw" else 0.0)))
        if self.parts["complement"] == "fira":
            correction = 1 / (1 - BETA1**self.age)
            if self.parts["moments"] != "momentum":
                correction *= np.sqrt(1 - BETA2**self.age)
            phi = np.linalg.norm(direction / correction, axis=0) / (np.linalg.norm(low, axis=0) + 1e-8)
            lifted = lifted + correction * self.limited(phi * dropped)
        self.weight = self.weight - LR * SCALE * lifted
        self.weight = self.weight - LR * DECAY * self.weight


def build(shape: tuple[int, int], parts: dict[str, str], **options: Any) -> tuple[nn.Parameter, NaturalGaLore]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": SCALE}
    settings = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY, "damping": DAMPING}
    if parts["fisher"] in ("history", "two_sided"):
        settings["history"] = HISTORY
    return weight, NaturalGaLore([group], stagger=False, subspace="svd", **settings, **parts, **options)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
@pytest.mark.parametrize("on_refresh", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("parts", COMBINATIONS, ids=lambda parts: " ".join(parts.values()))
def test_every_combination_equals_its_formulas(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, str], on_refresh: str, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(factored_fisher, "ROOT_INTERVAL", 3)
    weight, optimizer = build(shape, parts, on_refresh=on_refresh)
    wide = shape[0] < shape[1]
    written = Written((weight if wide else weight.mT).detach().numpy(), parts, on_refresh, root_interval=3)
    for number in range(3 * GAP):
        generator = torch.Generator().manual_seed(number)
        weight.grad = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0 ** (number % 3)  # so that the limiter acts
        grad = (weight.grad if wide else weight.grad.mT).numpy().copy()
        optimizer.step()
        if number % GAP == 0:  # its sign is arbitrary, so it is the optimizer's; that it is the right space is looked at here
            left, _, right = np.linalg.svd(grad)
            state = optimizer.state[weight]
            mine = state["basis"].numpy(), state["basis_long"].numpy() if "basis_long" in state else right.T
            np.testing.assert_allclose(mine[0] @ mine[0].T, left[:, :RANK] @ left[:, :RANK].T, atol=1e-8)
            np.testing.assert_allclose(mine[1][:, :RANK] @ mine[1][:, :RANK].T, right[:RANK].T @ right[:RANK], atol=1e-8)
            written.refresh(mine[0].copy(), mine[1].copy())
        written.step(grad)
        np.testing.assert_allclose((weight if wide else weight.mT).detach().numpy(), written.weight, rtol=0, atol=1e-8)


# -------------------------------------------------------------------------------------------------------- AdamW by other means
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=str)
def test_without_fisher_and_projection_it_is_torch_adamw(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Moments have the same bits. So would the weights in exact arithmetic if torch has GaLore's eps, eps / sqrt(1 - b2^t), and its order,
    decay after the step; in floating point each step may differ in its last places, 6 units of the weight at most.
    """
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)) for _ in range(2))
    group, betas = {"params": [ours], "rank": "full"}, (0.9, 0.999)
    mine = NaturalGaLore([group], lr=LR, betas=betas, fisher="none", scale=1.0, eps=1e-3, weight_decay=DECAY)
    reference = torch.optim.AdamW([theirs], lr=LR, weight_decay=0.0, foreach=False)
    for t in range(1, 30):
        ours.grad = torch.randn(shape, dtype=dtype)
        theirs.grad = ours.grad.clone()
        reference.param_groups[0]["eps"] = 1e-3 / (1 - 0.999**t) ** 0.5
        before, start = ours.detach().clone(), theirs.detach().clone()
        mine.step()
        reference.step()
        for key in ("exp_avg", "exp_avg_sq"):
            own = mine.state[ours][key]
            assert torch.equal(own if shape[0] < shape[1] else own.mT, reference.state[theirs][key])
        assert torch.equal(before, start)
        with torch.no_grad():
            theirs.mul_(1 - LR * DECAY)
        gap = (ours - theirs).abs() / torch.finfo(dtype).eps
        assert (gap <= 6 * start.abs().clamp(min=LR)).all()
        with torch.no_grad():
            theirs.copy_(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_eps_zero_and_no_decay_it_is_torch_adamw_over_many_steps(dtype: torch.dtype) -> None:
    ours, theirs = (nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=dtype)) for _ in range(2))
    mine = NaturalGaLore([{"params": [ours], "rank": "full"}], lr=LR, betas=(0.9, 0.99), fisher="none", scale=1.0, eps=0.0)
    reference = torch.optim.AdamW([theirs], lr=LR, betas=(0.9, 0.99), weight_decay=0.0, eps=0.0, foreach=False)
    for _ in range(50):
        ours.grad = torch.randn(6, 9, dtype=dtype)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=50 * torch.finfo(dtype).eps)


# ---------------------------------------------------------------------------------------------------- moments in fewer bits
@pytest.mark.parametrize("parts", [{"fisher": "none"}, {"fisher": "factored"}, {"fisher": "diagonal"}], ids=str)
@pytest.mark.parametrize(("state_dtype", "bound"), [("bf16", 0.01), ("8bit", 0.12)])
def test_moments_in_fewer_bits_lead_the_same_way(parts: dict[str, str], state_dtype: str, bound: float) -> None:
    """Relative distance of the way made in 40 updates from that with fp32 moments: a unit of bf16 is 0.8 %, a level of 8 bits 12 %."""
    ways = []
    for kept in ("fp32", state_dtype):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(48, 64))
        optimizer = NaturalGaLore([{"params": [weight], "rank": 16}], lr=LR, subspace="svd", stagger=False, state_dtype=kept, **parts)
        start = weight.detach().clone()
        trend = torch.randn(48, 64)
        for _ in range(40):
            weight.grad = 0.3 * trend + torch.randn(48, 64)
            optimizer.step()
        ways.append(weight.detach() - start)
    assert 0 < (ways[1] - ways[0]).norm() / ways[0].norm() < bound


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_a_slow_second_moment_in_fewer_bits_arrives(state_dtype: str) -> None:
    """With b2 = 0.999 each update changes it by a thousandth, less than any level: rounding to nearest would hold it fast."""
    weight = nn.Parameter(torch.zeros(32, 32))
    optimizer = GaLore([{"params": [weight], "rank": "full"}], lr=0.0, state_dtype=state_dtype)
    for _ in range(800):
        weight.grad = torch.ones(32, 32)
        optimizer.step()
    state = optimizer.state[weight]
    second = state["exp_avg_sq"].double()
    if state_dtype == "8bit":  # by the format's definition: s 2^(c // 8 - 31) (1 + (c mod 8) / 8)
        scales = state["exp_avg_sq_scale"].double().repeat_interleave(256)
        second = scales * 2 ** ((second / 8).floor() - 31) * (1 + second % 8 / 8)
    assert second.mean().item() == pytest.approx(1 - 0.999**800, rel=0.02)


# --------------------------------------------------------------------------------------------------------------- the limiter
def test_the_limiter_follows_its_rule_over_many_steps() -> None:
    state, remembered = torch.zeros((), dtype=torch.float64), 0.0
    for norm in (3.0, 3.02, 10.0, 10.0, 1.0, 5.0, 0.0, 7.0, 7.0, 1e-30, 1.0):
        factor = complement.limit_growth_(state, torch.tensor(norm, dtype=torch.float64))
        allowed = min(norm, 1.01 * remembered) if remembered > 0 else norm
        assert float(factor) * norm == pytest.approx(allowed, rel=1e-12, abs=0)
        assert float(state) == pytest.approx(allowed, rel=1e-12, abs=0)
        remembered = allowed


# ------------------------------------------------------------------------------------------------------- edges of the Fishers
@pytest.mark.parametrize("damping", [1e-30, 1e-12, 1e-3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-18, 1.0, 1e15])
def test_a_diagonal_fisher_is_finite_whatever_is_zero(damping: float, dtype: torch.dtype, size: float) -> None:
    state = diagonal_fisher.allocate_means(4, 6, dtype, torch.device("cpu"))
    grad = size * torch.ones(4, 6, dtype=dtype)
    grad[1], grad[:, 2] = 0.0, 0.0
    diagonal_fisher.remember_(state, *diagonal_fisher.mean_squares(grad, grad.shape[1], state["short_mean_sq"].dtype), 0.9)
    u, w = diagonal_fisher.scales(state, 0.9, 1, damping)
    update = u[:, None] * (grad * w)
    assert update.isfinite().all()
    assert not update[1].any()
    assert not update[:, 2].any()


def test_the_diagonal_fisher_makes_rows_and_columns_of_mean_square_one_if_the_gradient_factorises() -> None:
    torch.manual_seed(0)
    grad = torch.outer(torch.rand(5).double() + 0.1, torch.rand(8).double() + 0.1) * torch.randint(0, 2, (5, 8)).mul(2).sub(1)
    state = diagonal_fisher.allocate_means(5, 8, torch.float64, torch.device("cpu"))
    diagonal_fisher.remember_(state, *diagonal_fisher.mean_squares(grad, grad.shape[1], state["short_mean_sq"].dtype), 0.9)
    u, w = diagonal_fisher.scales(state, 0.9, 1, 1e-15)
    torch.testing.assert_close((u[:, None] * grad * w).abs(), torch.ones(5, 8).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e3])
def test_a_factored_root_makes_the_rows_uncorrelated_at_any_size(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    low = size * torch.randn(4, 4).to(torch.float64) @ torch.randn(4, 50).to(torch.float64)
    state = factored_fisher.allocate_factor(4, torch.zeros(1, dtype=dtype))
    low = low.to(state["fisher_factor"].dtype)
    factored_fisher.remember_(state, factored_fisher.covariance(low, 50), 0.9)
    factored_fisher.find_root_(state, 4, 0.9, 1, damping=1e-9)
    white = factored_fisher.apply_root(state, low)
    tolerance = {torch.bfloat16: 0.1, torch.float64: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(white @ white.mT / 50, torch.eye(4, dtype=low.dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_in_the_update_that_finds_a_root_is_skipped_or_shows_but_does_not_raise(bad: float) -> None:
    """An eigendecomposition of NaN raises, half-way through a step that has changed the weights before this one."""
    for guard in (True, False):
        weight = torch.nn.Parameter(torch.ones(6, 8))
        optimizer = NaturalGaLore([{"params": [weight], "rank": 2}], lr=0.01, fisher="factored")
        for index in range(factored_fisher.ROOT_INTERVAL - 1):
            weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(index))
            optimizer.step()
        before = [weight.detach().clone(), *(optimizer.state[weight][key].clone() for key in ("fisher_factor", "fisher_root"))]
        optimizer.apply_gradient(weight, optimizer.reduce_gradient(weight, torch.full((6, 8), bad)), guard=guard)
        after = [weight.detach(), *(optimizer.state[weight][key] for key in ("fisher_factor", "fisher_root"))]
        if guard:
            assert all(map(torch.equal, before, after))
        else:
            assert not any(tensor.isfinite().any() for tensor in after)


def test_a_factored_root_starts_with_the_first_gradient_that_shows_a_scale_and_not_before() -> None:
    state = factored_fisher.allocate_factor(3, torch.zeros(1))
    for t in (1, 2):
        factored_fisher.remember_(state, torch.zeros(6), 0.9)
        factored_fisher.start_root_(state, 3, 0.9, t)
        assert not state["fisher_root"].any()
    factored_fisher.find_root_(state, 3, 0.9, 2, 1e-3)
    assert not state["fisher_root"].any()
    factored_fisher.remember_(state, factored_fisher.covariance(2.0 * torch.eye(3), 1), 0.9)
    factored_fisher.start_root_(state, 3, 0.9, 1)
    expected = 0.5 * torch.ones(3, 1)
    torch.testing.assert_close(factored_fisher.apply_root(state, torch.ones(3, 1)), expected)
    factored_fisher.remember_(state, factored_fisher.covariance(30.0 * torch.eye(3), 1), 0.9)
    factored_fisher.start_root_(state, 3, 0.9, 2)  # it has started
    torch.testing.assert_close(factored_fisher.apply_root(state, torch.ones(3, 1)), expected)


def test_steps_stay_as_long_when_a_refresh_replaces_directions() -> None:
    """Two of eight at each refresh, in which a factor that only turns would see nothing until the next root."""

    def lengths(fisher: str) -> list[float]:
        weight = nn.Parameter(torch.zeros(32, 48))
        group = {"params": [weight], "rank": 8, "update_proj_gap": 50, "scale": 1.0}
        optimizer = NaturalGaLore([group], lr=1.0, betas=(0.9, 0.99), fisher=fisher, stagger=False, subspace="svd")
        moved = []
        for update in range(200):
            refresh = update // 50
            rows = torch.tensor([*range(6), 6 + 2 * refresh, 7 + 2 * refresh])
            grad = 0.01 * torch.randn(32, 48, generator=torch.Generator().manual_seed(update))
            grad[rows] *= 100 / torch.arange(1.0, 9.0)[:, None]
            before, weight.grad = weight.detach().clone(), grad
            optimizer.step()
            moved.append(float((weight.detach() - before).norm()))
        return [sum(moved[end - 10 : end]) for end in (50, 100, 150, 200)]

    for factored, plain in zip(lengths("factored"), lengths("none"), strict=True):
        assert 0.8 * plain < factored < 1.25 * plain


# ------------------------------------------------------------------------------------------------------------ adaptive rank
def test_the_rank_is_the_smallest_that_keeps_the_share_of_energy() -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(12, 8).double()).Q, torch.linalg.qr(torch.randn(20, 8).double()).Q
    values = torch.tensor([4.0, 2, 2, 1, 1, 1, 0.5, 0.5], dtype=torch.float64)
    shares = (values.square().cumsum(0) / values.square().sum()).tolist()
    for energy, low, high in itertools.product((0.3, shares[1] - 1e-6, shares[1] + 1e-6, 0.9, 1.0), (1, 3), (4, 7)):
        for subspace in ("svd", "randomized"):
            weight = nn.Parameter(torch.zeros(12, 20, dtype=torch.float64))
            optimizer = AdaRankGrad([{"params": [weight], "rank": high, "min_rank": low}], energy=energy, subspace=subspace, stagger=False)
            weight.grad = left * values @ right.T
            optimizer.step()
            smallest = next((rank for rank, share in enumerate(shares, 1) if share >= energy), 8)
            assert optimizer.state[weight]["rank"] == min(max(smallest, low), high)
            basis = optimizer.state[weight]["basis"]
            assert basis.count_nonzero(dim=0).bool().sum() == optimizer.state[weight]["rank"]


def test_a_converged_projected_gradient_asks_for_a_refresh_at_the_next_look() -> None:
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = AdaRankGrad([{"params": [weight], "rank": 3, "update_proj_gap": 1000}], converged_below=0.5, stagger=False)
    grad, seen = torch.randn(6, 10), []
    for update in range(45):
        weight.grad = grad * (1.0 if update < 14 else 0.4 if update < 33 else 0.1)
        optimizer.step()
        seen.append(int(optimizer.state[weight]["refreshes"]))
    changes = [update for update in range(1, 45) if seen[update] > seen[update - 1]]
    assert changes == [20, 40]


def test_with_all_energy_and_no_look_at_convergence_it_is_galore_at_the_largest_rank() -> None:
    weights = [nn.Parameter(torch.zeros(6, 10)) for _ in range(2)]
    common = {"subspace": "svd", "on_refresh": "rotate", "stagger": True, "lr": 0.1}
    adaptive = AdaRankGrad([{"params": weights[:1], "rank": 3, "update_proj_gap": 3}], energy=1.0, converged_below=0.0, **common)
    fixed = GaLore([{"params": weights[1:], "rank": 3, "update_proj_gap": 3}], **common)
    for _ in range(10):
        weights[0].grad = torch.randn(6, 10)
        weights[1].grad = weights[0].grad.clone()
        adaptive.step()
        fixed.step()
    assert torch.equal(*weights)
