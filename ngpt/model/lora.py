"""LoRA adapters (arXiv:2106.09685) on the matrices of attention and MLP: W frozen, W x + (alpha / r) B A x trained through A and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ngpt.model.layers import Linear
from ngpt.model.llama import LlamaForCausalLM

_A, _B, _W = ".lora_A", ".lora_B", ".weight"  # ends of the parameters' names


class Adapter(NamedTuple):
    """The three parameters of an adapted matrix: W (m, n), frozen; A (r, n); B (m, r)."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor


class LoRALinear(nn.Module):
    """x -> W x + (alpha / rank) B A x, in the place of a linear map without bias, whose weight it takes over and freezes.

    A is drawn from U(-1/sqrt(n), 1/sqrt(n)), which is Kaiming's uniform distribution with LoRA's a = sqrt(5), in fp32 on the CPU from
    torch's global generator; B is zero, so that nothing changes at first. There is no dropout: a run of pretraining sees no token twice.
    """

    def __init__(self, linear: Linear, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        rows, columns = linear.out_features, linear.in_features  # where weights are partitioned, their shapes do not say it
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, columns))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(rows, rank))
        self.scale = alpha / rank
        if not self.lora_A.is_meta:
            drawn = torch.empty(rank, columns, dtype=torch.float32, device="cpu").uniform_(-1, 1)
            with torch.no_grad():
                self.lora_A.copy_(drawn.mul_(columns**-0.5))

    def forward(self, x: Tensor) -> Tensor:  # (..., n) -> (..., m)
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)


def add_adapters(model: LlamaForCausalLM, *, rank: int, alpha: float) -> None:
    """Put an adapter on every matrix of the decoder blocks, in place. Embedding, head and norms stay as they are and trainable.

    Parameters keep their names; each adapted `*.weight` gets a `*.lora_A` and a `*.lora_B` beside it. Before the model is compiled.

    Raises ValueError, and changes nothing, if the rank is not below the shorter side of every matrix, or there are adapters already.
    """
    linears = [
        (parent, name, linear)
        for parent in model.model.layers.modules()
        for name, linear in parent.named_children()
        if isinstance(linear, Linear)
    ]
    if not linears:
        raise ValueError("the model has adapters already")
    shortest = min(min(linear.out_features, linear.in_features) for _, _, linear in linears)
    if not 1 <= rank < shortest:
        raise ValueError(f"rank = {rank} must be at least 1 and below {shortest}, the shortest side of the model's matrices")
    for parent, name, linear in linears:
        setattr(parent, name, LoRALinear(linear, rank=rank, alpha=alpha))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a part of an adapter."""
    return name.endswith((_A, _B))


def adapters(model: nn.Module) -> list[tuple[str, Adapter]]:
    """The adapted matrices by their modules' names, in the order of the model."""
    return [
        (name, Adapter(module.weight, module.lora_A, module.lora_B))
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    ]


def merged_weights(weights: Mapping[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """Weights of an adapted model as those of the plain one: every W + (alpha / r) B A, added in fp32 and rounded to W's dtype.

    Args:
        weights: by name, as `named_parameters()` or a checkpoint's model.safetensors gives them; not changed.
        alpha: as the model was trained with (`optimizer.lora_alpha`).
    """
    plain = {name: weight for name, weight in weights.items() if not name.endswith((_A, _B))}
    for name in weights:
        if name.endswith(_A):
            matrix = name.removesuffix(_A)
            weight, down, up = weights[matrix + _W], weights[name], weights[matrix + _B]
            merged = torch.addmm(weight.float(), up.float(), down.float(), alpha=alpha / down.shape[0])
            plain[matrix + _W] = merged.to(weight.dtype)
    return plain
