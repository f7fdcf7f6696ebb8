"""Published optimizers that the race compares with: RACS, FOAM, APOLLO, Fira and SCALE, for matrices only.

Written from the papers' formulas. Each keeps its state in fp32, updates a matrix from its whole gradient and leaves embedding, head and
norms to somebody else. Muon is torch.optim.Muon. Letters: W is m x n; for APOLLO and Fira a is the shorter side, b the longer, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


class Rival(torch.optim.Optimizer):
    """A rule for one matrix, W <- W - lr * scale * rule(G): subclasses say how the state begins and what the rule is."""

    def __init__(self, params: Iterable[Any], lr: float, *, scale: float = 1.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "scale": scale, **options})

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        raise NotImplementedError

    def direction(self, grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """The update of shape (m, n); changes the state in place. `state["step"]` counts from 1."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for index, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(self.begin(weight, group), step=0, index=index)
                state["step"] += 1
                weight.add_(self.direction(weight.grad, state, group), alpha=-group["lr"] * group["scale"])
        return loss


def limit_growth_(update: Tensor, state: State, gamma: float = 1.01) -> Tensor:
    """Fira's norm-growth limiter (arXiv:2410.01623): |U_t| <= gamma |U_{t-1}|, in place. `state["norm"]` is 0 before the first update."""
    norm, last = torch.linalg.vector_norm(update), state["norm"]
    factor = torch.where((last > 0) & (norm > gamma * last), gamma * last / norm, torch.ones_like(norm))
    last.copy_(norm * factor)
    return update.mul_(factor)


class RACS(Rival):
    """Row and column scaled SGD (arXiv:2502.07752). State m + n + 1.

    The Fisher of the entries is fitted by an outer product, G o G ~ q s', with a few fixed-point steps
    s = (G o G)' q / |q|^2, q = (G o G) s / |s|^2 from q = 1. Averages over time of q and s scale the gradient:
    U = G / sqrt(q s'), with the norm-growth limiter. The averages begin with the first estimate.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, beta: float = 0.9, iterations: int = 5, **options: Any) -> None:
        super().__init__(params, lr, beta=beta, iterations=iterations, **options)

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        return {"row": weight.new_zeros(weight.shape[0]), "column": weight.new_zeros(weight.shape[1]), "norm": weight.new_zeros(())}

    def direction(self, grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        squares_mn = grad.square()
        row_m, column_n = torch.ones_like(state["row"]), state["column"]
        for _ in range(group["iterations"]):
            column_n = squares_mn.mT @ row_m / row_m.square().sum().clamp(min=1e-30)
            row_m = squares_mn @ column_n / column_n.square().sum().clamp(min=1e-30)
        weight_of_new = 1.0 if state["step"] == 1 else 1 - group["beta"]
        row_m, column_n = state["row"].lerp_(row_m, weight_of_new), state["column"].lerp_(column_n, weight_of_new)
        scale_m, scale_n = (x.clamp(min=1e-30).rsqrt() for x in (row_m, column_n))
        return limit_growth_(grad * scale_m[:, None] * scale_n, state)


class FOAM(Rival):
    """Adam on means of blocks of 2^level neighbours in a row, plus what the means leave out (arXiv:2512.07112). State 2 m n / 2^level.

    With g and s the block means of G and of G o G, M and V their averages over time, E the repetition over a block:
    U = (E M + G - E g) / (sqrt(E V + (G - E g)^2) + eps), times sqrt(1 - b2^t) / (1 - b1^t).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        level: int = 2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, level=level, betas=betas, eps=eps, **options)

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        blocks = weight.shape[1] >> group["level"]
        if blocks << group["level"] != weight.shape[1]:
            raise ValueError(f"FOAM: {weight.shape[1]} columns are not a multiple of 2^level = {1 << group['level']}")
        return {key: weight.new_zeros(weight.shape[0], blocks) for key in ("exp_avg", "exp_avg_sq")}

    def direction(self, grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        (beta1, beta2), size = group["betas"], 1 << group["level"]
        blocks = grad.unflatten(1, (-1, size))
        mean, mean_square = blocks.mean(-1), blocks.square().mean(-1)
        residual = blocks - mean[..., None]
        first, second = state["exp_avg"].lerp_(mean, 1 - beta1), state["exp_avg_sq"].lerp_(mean_square, 1 - beta2)
        update = (first[..., None] + residual) / ((second[..., None] + residual.square()).sqrt() + group["eps"])
        return update.flatten(1).mul_(math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"]))


class APOLLO(Rival):
    """The gradient, scaled by what Adam would do to a random projection of it (arXiv:2412.05270). State 2 b r + 1; Mini: r = 1.

    R = P G with P (r, a) drawn from N(0, 1/r) every `update_proj_gap` updates from a seed; N = Adam's direction for R;
    s_j = |N_j| / |R_j| for every column j ("channel"), or one s = |N| / |R| ("tensor", Mini); U = sqrt(alpha) s G with the norm-growth
    limiter. `alpha` is the paper's scale: 1, and 128 for Mini.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        rank: int,
        update_proj_gap: int = 200,
        per: str = "channel",
        alpha: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank=rank, update_proj_gap=update_proj_gap, per=per, alpha=alpha, betas=betas, eps=eps, **options)

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        shape = (group["rank"], max(weight.shape))
        return {"exp_avg": weight.new_zeros(shape), "exp_avg_sq": weight.new_zeros(shape), "norm": weight.new_zeros(())}

    def projection(self, grad_ab: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """P, the same between two refreshes, drawn anew from its seed instead of kept."""
        refresh = (state["step"] - 1) // group["update_proj_gap"]
        generator = torch.Generator().manual_seed(1_000_003 * state["index"] + refresh)
        return torch.randn(group["rank"], grad_ab.shape[0], generator=generator).to(grad_ab) / math.sqrt(group["rank"])

    def direction(self, grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        wide = grad.shape[0] < grad.shape[1]
        grad_ab, (beta1, beta2) = grad if wide else grad.mT, group["betas"]
        low_rb = self.projection(grad_ab, state, group) @ grad_ab
        first, second = state["exp_avg"].lerp_(low_rb, 1 - beta1), state["exp_avg_sq"].lerp_(low_rb.square(), 1 - beta2)
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        adam_rb = first / (second.sqrt() + group["eps"]) * correction
        dim = 0 if group["per"] == "channel" else None
        scale = torch.linalg.vector_norm(adam_rb, dim=dim) / (torch.linalg.vector_norm(low_rb, dim=dim) + 1e-8)
        update_ab = limit_growth_(grad_ab * scale, state) * math.sqrt(group["alpha"])
        return update_ab if wide else update_ab.mT


class PublishedFira(Rival):
    """Fira as its authors released it (arXiv:2410.01623, its code): GaLore with what the projection dropped. State a r + 2 b r + 1.

    R = P'G with P the first r left singular vectors of the gradient every `update_proj_gap` updates; N = M / (sqrt(V) + eps), not rotated;
    phi_j = |N_j| / |R_j|; S = phi (G - alpha P R) with the norm-growth limiter; U = (alpha P N + S) with Adam's bias corrections. Unlike
    the paper's formula, which `ngpt.optim` has, alpha is on the projected part alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        rank: int,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank=rank, update_proj_gap=update_proj_gap, alpha=alpha, betas=betas, eps=eps, **options)

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        low, short = (group["rank"], max(weight.shape)), min(weight.shape)
        return {
            "basis": weight.new_zeros(short, group["rank"]),
            "exp_avg": weight.new_zeros(low),
            "exp_avg_sq": weight.new_zeros(low),
            "norm": weight.new_zeros(()),
        }

    def direction(self, grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        wide = grad.shape[0] < grad.shape[1]
        grad_ab, (beta1, beta2), alpha = grad if wide else grad.mT, group["betas"], group["alpha"]
        if (state["step"] - 1) % group["update_proj_gap"] == 0:
            state["basis"] = torch.linalg.svd(grad_ab, full_matrices=False)[0][:, : group["rank"]].contiguous()
        basis_ar = state["basis"]
        low_rb = basis_ar.mT @ grad_ab
        first, second = state["exp_avg"].lerp_(low_rb, 1 - beta1), state["exp_avg_sq"].lerp_(low_rb.square(), 1 - beta2)
        adam_rb = first / (second.sqrt() + group["eps"])
        scale_b = torch.linalg.vector_norm(adam_rb, dim=0) / (torch.linalg.vector_norm(low_rb, dim=0) + 1e-8)
        dropped_ab = limit_growth_(scale_b * (grad_ab - alpha * (basis_ar @ low_rb)), state)
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        update_ab = correction * (alpha * (basis_ar @ adam_rb) + dropped_ab)
        return update_ab if wide else update_ab.mT


class SCALE(Rival):
    """Gradient descent with every output's gradient divided by its root mean square (arXiv:2506.16659). No state on hidden matrices."""

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        return {}

    def direction(self, grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        return grad / grad.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
