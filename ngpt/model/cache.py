"""Keys and values of the tokens so far, so that generating the next token runs the model on that one alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ngpt.config.schema import ModelConfig
from ngpt.model.cost import head_dim, num_key_value_heads


class KeyValueCache:
    """What attention of all blocks needs of the tokens that went through the model before. For `Decoder.forward`, without gradients.

    Costs 2 * layers * key/value heads * head_dim numbers a position and sequence.

    Args:
        batch_size: sequences that are generated together.
        capacity: most tokens of each, at most `config.max_seq_len` (else ValueError).
    """

    def __init__(self, config: ModelConfig, *, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        if capacity > config.max_seq_len:
            raise ValueError(f"{capacity} tokens are more than model.max_seq_len={config.max_seq_len}: the model knows no later position")
        self.length = 0
        self._capacity = capacity
        shape = (batch_size, capacity, num_key_value_heads(config), head_dim(config))
        self._keys, self._values = (
            [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)] for _ in range(2)
        )

    def extend(self, layer: int, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what block `layer` has of the new tokens. Returns views of all up to there, (B, length + T, K, D)."""
        end = self.length + k_BTKD.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self.length : end], values[:, self.length : end] = k_BTKD, v_BTKD
        return keys[:, :end], values[:, :end]

    def begin(self, new_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the new tokens, (T,), and which positions each of them may look at, (1, 1, T, length + T)."""
        end = self.length + new_tokens
        if end > self._capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {self._capacity}")
        positions = torch.arange(self.length, end, device=device)
        return positions, (positions[:, None] >= torch.arange(end, device=device))[None, None]

    def advance(self, new_tokens: int) -> None:
        """Count tokens that all blocks have seen."""
        self.length += new_tokens
