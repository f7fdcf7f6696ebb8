"""The layers without attention: linear and embedding with the published initialisation, RMSNorm, the SwiGLU feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shape suffixes in this room: B batch, T time (tokens), H hidden size, N query heads, K key/value heads, D head dimension,
# M intermediate size, V vocabulary; C a chunk of the B * T positions. `...` stands for any leading dimensions.


def draw_normal_(weight: Tensor, std: float) -> None:
    """Fill `weight` in place from a normal distribution, drawn in fp32 on the CPU and cast.

    The numbers then depend on torch's seed alone, not on the device or the default dtype that the model is built with.
    A meta tensor, which has no numbers, is left alone.
    """
    if weight.is_meta:
        return
    drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu").normal_(0.0, std)
    with torch.no_grad():
        weight.copy_(drawn)


class Linear(nn.Linear):
    """Linear map without bias, initialised N(0, std^2)."""

    def __init__(self, in_features: int, out_features: int, *, std: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        draw_normal_(self.weight, std)

    def reset_parameters(self) -> None:
        """Does nothing: torch would draw weights here that the constructor replaces, at the cost of time and random numbers."""


class Embedding(nn.Embedding):
    """Look-up table, initialised N(0, std^2)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        draw_normal_(self.weight, std)

    def reset_parameters(self) -> None:
        """Does nothing; see `Linear.reset_parameters`."""


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467): statistics in fp32, the result cast back before it meets the weight."""

    def __init__(self, hidden_size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:  # (..., H) -> (..., H)
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)  # torch computes in fp32 inside, whatever the dtype of x


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, std: float) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, std=std)
        self.up_proj = Linear(hidden_size, intermediate_size, std=std)
        self.down_proj = Linear(intermediate_size, hidden_size, std=std)

    def forward(self, x: Tensor) -> Tensor:  # (..., H) -> (..., H)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
