"""The s x s solve equals a dense float64 solve with lambda I + H H'."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngpt.optim import NaturalGaLore, natural_gradient
from ngpt.optim.natural_gradient import enter_row_, gram_matrix, remember_


def dense(gradients: list[Tensor], damping: float) -> Tensor:
    """(lambda I + sum h h')^-1 h_last with a k x k solve in float64."""
    columns_ks = torch.stack(gradients, dim=1).double()
    fisher_kk = damping * torch.eye(columns_ks.shape[0], dtype=torch.float64) + columns_ks @ columns_ks.T
    return torch.linalg.solve(fisher_kk, columns_ks[:, -1])


def by_singular_values(gradients: list[Tensor], damping: float) -> Tensor:
    """The same from H = U S V': U S / (lambda + S^2) V' e, which keeps its digits where lambda is too small for the dense solve."""
    left, values, right = torch.linalg.svd(torch.stack(gradients, dim=1).double(), full_matrices=False)
    return left @ (values / (damping + values**2) * right[:, -1])


def through_history(gradients: list[Tensor], size: int, damping: float, dtype: torch.dtype | None = None) -> Tensor:
    history, gram = torch.zeros(size, gradients[0].numel(), dtype=dtype or gradients[0].dtype), torch.zeros(size, size, dtype=torch.float64)
    for number, gradient in enumerate(gradients):
        enter_row_(gram, remember_(history, gradient, number % size), number % size)
    return natural_gradient.natural_gradient(history, gram, (len(gradients) - 1) % size, damping)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm().clamp(min=1e-300))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    k=st.integers(1, 60),
    size=st.integers(1, 24),
    seen=st.integers(1, 50),
    damping=st.sampled_from([1e-3, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["random", "repeated", "some zero"]),
)
def test_equals_a_dense_solve_in_float64(k: int, size: int, seen: int, damping: float, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(k, generator=generator, dtype=torch.float64) for _ in range(seen)]
    if kind == "repeated":
        gradients = [gradients[number // 3] for number in range(seen)]
    if kind == "some zero":
        gradients = [gradient * (number % 3 != 1) for number, gradient in enumerate(gradients)]
    assert relative_error(through_history(gradients, size, damping), dense(gradients[-size:], damping)) < 1e-7
    stored = [gradient.float() for gradient in gradients]
    assert relative_error(through_history(stored, size, damping), dense(stored[-size:], damping)) < 1e-7


@settings(max_examples=60, deadline=None, derandomize=True)
@given(k=st.integers(1, 60), size=st.integers(1, 24), seed=st.integers(0, 1000), damping=st.sampled_from([1e-12, 1e-9, 1e-6, 1e6]))
def test_tiny_and_huge_damping(k: int, size: int, seed: int, damping: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(k, generator=generator, dtype=torch.float64) for _ in range(size)]
    singular = torch.linalg.svdvals(torch.stack(gradients))
    if singular[-1] < 0.05 * singular[0]:
        return  # the last gradient is then nearly a combination of others, and the answer hangs on the rounding of its digits
    assert relative_error(through_history(gradients, size, damping), by_singular_values(gradients, damping)) < 1e-3


@pytest.mark.parametrize("damping", [1e-12, 1e-3, 1e6])
def test_a_repeated_gradient_has_the_answer_known_in_closed_form(damping: float) -> None:
    gradient = torch.linspace(-1, 1, 50)
    expected = gradient.double() / (damping + 6 * gradient.double().square().sum())
    assert relative_error(through_history([gradient] * 6, 6, damping), expected) < 1e-4


@pytest.mark.parametrize("damping", [1e-12, 1e-3, 1e6])
def test_a_zero_gradient_gives_zero_before_and_after_others(damping: float) -> None:
    zero, other = torch.zeros(10), torch.ones(10)
    for gradients in ([zero], [zero, zero], [other, zero], [zero, other, zero]):
        assert torch.equal(through_history(gradients, 4, damping), zero.double())


def test_a_bf16_history_is_solved_exactly_for_what_it_stores() -> None:
    gradients = [torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    stored = [gradient.bfloat16().float() for gradient in gradients]
    solved = through_history(gradients, 5, 1e-3, dtype=torch.bfloat16)
    assert relative_error(solved, dense(stored[-5:], 1e-3)) < 1e-7


def test_rows_not_yet_written_change_nothing() -> None:
    gradients = [torch.randn(30, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    torch.testing.assert_close(through_history(gradients, 3, 0.1), through_history(gradients, 20, 0.1), rtol=1e-12, atol=0)


def test_the_gram_matrix_kept_row_by_row_is_the_gram_matrix() -> None:
    history, gram = torch.zeros(4, 30), torch.zeros(4, 4, dtype=torch.float64)
    for number in range(11):
        enter_row_(gram, remember_(history, torch.randn(30), number % 4), number % 4)
    torch.testing.assert_close(gram, history.double() @ history.double().T)
    torch.testing.assert_close(gram_matrix(history), gram)


def test_chunks_of_a_long_history_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [torch.randn(100, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(7)]
    whole = through_history(gradients, 4, 0.1)
    monkeypatch.setattr(natural_gradient, "CHUNK_ELEMENTS", {"cpu": 52})
    torch.testing.assert_close(through_history(gradients, 4, 0.1), whole, rtol=1e-12, atol=1e-12)


def test_shards_of_a_history_need_only_the_sum_of_their_inner_products() -> None:
    gradients = [torch.randn(30, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]
    parts = [slice(0, 11), slice(11, 30)]
    histories, grams = [torch.zeros(4, 11).double(), torch.zeros(4, 19).double()], [torch.zeros(4, 4).double() for _ in parts]
    for number, gradient in enumerate(gradients):
        slot = number % 4
        rows = [remember_(history, gradient[part], slot) for history, part in zip(histories, parts, strict=True)]
        for gram in grams:
            enter_row_(gram, sum(rows[1:], rows[0]), slot)
    pieces = [natural_gradient.natural_gradient(history, gram, 0, 0.1) for history, gram in zip(histories, grams, strict=True)]
    torch.testing.assert_close(torch.cat(pieces), through_history(gradients, 4, 0.1), rtol=1e-10, atol=1e-12)


def test_the_optimizer_feeds_adam_with_the_natural_gradient() -> None:
    torch.manual_seed(0)
    lr, b1, b2, eps, damping, size = 0.1, 0.9, 0.99, 1e-6, 0.05, 3
    weight = torch.nn.Parameter(torch.randn(5, 8, dtype=torch.float64))
    expected = weight.detach().clone()
    optimizer = NaturalGaLore(
        [{"params": [weight], "rank": "full"}],
        lr=lr,
        betas=(b1, b2),
        eps=eps,
        scale=1.0,
        fisher="history",
        history=size,
        damping=damping,
    )
    seen, first, second = [], 0, 0
    for t in range(1, 7):
        weight.grad = torch.randn(5, 8, dtype=torch.float64)
        seen.append(weight.grad.reshape(-1).clone())
        optimizer.step()
        natural = dense(seen[-size:], damping).view(5, 8)
        first, second = b1 * first + (1 - b1) * natural, b2 * second + (1 - b2) * natural**2
        expected = expected - lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * first / (second.sqrt() + eps)
        torch.testing.assert_close(weight.detach(), expected, atol=1e-9, rtol=0)
