"""Adam's moments and the two ways of turning them into a step: torch's AdamW, and GaLore's order for projected matrices.

Pure functions on explicit tensors; a trailing underscore marks what is changed in place. `t` is the number of updates that the
moments have seen, this one included.
"""

# torch._foreach_* is how torch's own optimizers update many tensors at once; it is not in torch's __all__.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math

import torch
from torch import Tensor


def update_moments_(first: Tensor, second: Tensor, grad: Tensor, betas: tuple[float, float]) -> None:
    """m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g o g (Adam, arXiv:1412.6980, algorithm 1), in place."""
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def galore_direction(first: Tensor, second: Tensor, eps: float, *, out: Tensor) -> None:
    """N = m / (sqrt(v) + eps) into `out`. GaLore puts the bias corrections in the step size, so eps is not scaled by them."""
    torch.sqrt(second, out=out)
    torch.div(first, out.add_(eps), out=out)


def galore_step_factor(betas: tuple[float, float], t: int) -> float:
    """sqrt(1 - b2^t) / (1 - b1^t): the factor on lr N in GaLore's code."""
    return math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    steps: list[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """torch.optim.AdamW's update of many parameters at once, in place, in torch's own order (decay before the step; arXiv:1711.05101).

    All tensors of one parameter have one dtype and device.
    """
    if weight_decay != 0:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_lerp_(firsts, grads, 1 - betas[0])
    torch._foreach_mul_(seconds, betas[1])
    torch._foreach_addcmul_(seconds, grads, grads, 1 - betas[1])
    denominators = torch._foreach_sqrt(seconds)
    torch._foreach_div_(denominators, [math.sqrt(1 - betas[1] ** t) for t in steps])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(weights, firsts, denominators, [-lr / (1 - betas[0] ** t) for t in steps])
