"""Causal self-attention with rotary positions, grouped key/value heads and, on request, borders between documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ngpt.config.schema import ModelConfig
from ngpt.model.cost import head_dim, num_key_value_heads
from ngpt.model.layers import Linear


def document_index(document_ids_BT: Tensor) -> Tensor:
    """Number of the document that each position belongs to, counted from 0 in each row: a run of equal ids is one document."""
    starts = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return F.pad(starts.long().cumsum(dim=1), (1, 0))


def positions_in_document(document_index_BT: Tensor) -> Tensor:
    """Distance of each position from the start of its document, (B, T)."""
    position_T = torch.arange(document_index_BT.shape[1], device=document_index_BT.device)
    is_start_BT = F.pad(document_index_BT[:, 1:] != document_index_BT[:, :-1], (1, 0), value=True)
    start_BT = torch.where(is_start_BT, position_T, 0).cummax(dim=1).values
    return position_T - start_BT


def document_causal_mask(document_index_BT: Tensor) -> Tensor:
    """True where a query (row) may look at a key (column): in the same document and not later; (B, 1, T, T)."""
    same_BTT = document_index_BT[:, :, None] == document_index_BT[:, None, :]
    return same_BTT.tril()[:, None]


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (RoFormer, arXiv:2104.09864) for `positions` of shape (T,) or (B, T).

    Each of shape positions.shape + (1, head_dim / 2), to meet (B, T, N, D / 2). fp32 whatever the model's dtype: nothing is kept
    in a buffer that `module.to(bfloat16)` would round. Costs T * head_dim / 2 sines per forward, nothing beside the blocks.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * theta**-exponents
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def apply_rotary(x_BTND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head by their angle: Hugging Face's half-split order. In fp32, cast back at the end."""
    cos, sin = rotary
    first, second = x_BTND.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BTND.dtype)


KeepKeysValues = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # new keys and values -> those of all tokens so far; (B, ., K, D)


class Attention(nn.Module):
    """Self-attention of one block. Every `num_attention_heads / num_key_value_heads` query heads share a key/value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, std = config.hidden_size, config.initializer_range
        self.head_dim = head_dim(config)
        self.num_queries_per_key = config.num_attention_heads // num_key_value_heads(config)
        query_width, key_value_width = config.num_attention_heads * self.head_dim, num_key_value_heads(config) * self.head_dim
        self.q_proj = Linear(hidden, query_width, std=std)
        self.k_proj = Linear(hidden, key_value_width, std=std)
        self.v_proj = Linear(hidden, key_value_width, std=std)
        self.o_proj = Linear(query_width, hidden, std=std)

    def forward(self, x_BTH: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, keep: KeepKeysValues | None = None) -> Tensor:
        """(B, T, H) -> (B, T, H). `mask`: (B, 1, T, T), True where attention is allowed; None: causal.

        With `keep`, attention reaches back to tokens that are not in `x_BTH`, and the mask has a column for each of them too.
        """
        q_BTND, k_BTKD, v_BTKD = (
            projection(x_BTH).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BNTD, k_BTKD = apply_rotary(q_BTND, rotary).transpose(1, 2), apply_rotary(k_BTKD, rotary)
        if keep is not None:
            k_BTKD, v_BTKD = keep(k_BTKD, v_BTKD)
        k_BNTD, v_BNTD = (self._for_each_query_head(x) for x in (k_BTKD, v_BTKD))
        mixed_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(mixed_BNTD.transpose(1, 2).flatten(2))

    def _for_each_query_head(self, x_BTKD: Tensor) -> Tensor:
        """(B, T, K, D) -> (B, N, T, D). Repeated in memory rather than by `enable_gqa`, which not every fused kernel knows with a mask."""
        if self.num_queries_per_key > 1:
            x_BTKD = x_BTKD.repeat_interleave(self.num_queries_per_key, dim=2)
        return x_BTKD.transpose(1, 2)
