"""LLaMA (arXiv:2302.13971): a decoder whose parameters carry the names of Hugging Face's LlamaForCausalLM."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, arange, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from ngpt.config.schema import ModelConfig
from ngpt.model.attention import (
    Attention,
    KeepKeysValues,
    document_causal_mask,
    document_index,
    positions_in_document,
    rotary_tables,
)
from ngpt.model.cache import KeyValueCache
from ngpt.model.cost import head_dim
from ngpt.model.layers import Embedding, FeedForward, RMSNorm
from ngpt.model.loss import LanguageModelHead


class DecoderBlock(nn.Module):
    """Attention and feed-forward layer, each on a normed copy of the residual stream and added back to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, std=config.initializer_range)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BTH: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, keep: KeepKeysValues | None = None) -> Tensor:
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), rotary, mask, keep)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))


class Decoder(nn.Module):
    """Embedding, blocks and last norm: tokens to hidden states."""

    def __init__(self, config: ModelConfig, *, checkpoint_every: int) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every = checkpoint_every
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=config.initializer_range)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, H)."""
        if document_ids_BT is None:
            positions, mask = arange(input_ids_BT.shape[1], device=input_ids_BT.device), None
        else:
            document_index_BT = document_index(document_ids_BT)
            positions, mask = positions_in_document(document_index_BT), document_causal_mask(document_index_BT)
        rotary = rotary_tables(positions, head_dim(self.config), self.config.rope_theta)
        x_BTH = self.embed_tokens(input_ids_BT)
        for index, block in enumerate(self.layers):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and is_grad_enabled():
                # Nothing in a block is random, so there is no generator state to keep for the second run.
                x_BTH = checkpoint(block, x_BTH, rotary, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTH = block(x_BTH, rotary, mask)
        return self.norm(x_BTH)

    def continue_(self, input_ids_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """As `forward` for tokens that follow those in `cache`, which takes them up too: (B, T) -> (B, T, H)."""
        positions, mask = cache.begin(input_ids_BT.shape[1], input_ids_BT.device)
        rotary = rotary_tables(positions, head_dim(self.config), self.config.rope_theta)
        x_BTH = self.embed_tokens(input_ids_BT)
        for index, block in enumerate(self.layers):
            x_BTH = block(x_BTH, rotary, mask, partial(cache.extend, index))
        cache.advance(input_ids_BT.shape[1])
        return self.norm(x_BTH)


class LlamaForCausalLM(nn.Module):
    """LLaMA with its head and loss.

    Initialised as the published benchmark's models: every matrix N(0, initializer_range^2), norms 1, drawn in fp32 on the CPU from
    torch's global generator: same seed, same weights, whatever device or dtype they are moved to afterwards.

    Args:
        config: the shape. Heads that do not divide it raise ValueError.
        loss_chunk_tokens: positions whose logits exist at one time while the loss is computed.
        checkpoint_every: recompute every k-th block's activations in backward (0: none, 1: all).
    """

    def __init__(self, config: ModelConfig, *, loss_chunk_tokens: int = 2048, checkpoint_every: int = 0) -> None:
        super().__init__()
        if loss_chunk_tokens < 1:
            raise ValueError(f"loss_chunk_tokens={loss_chunk_tokens} must be at least 1; 2048 suits most machines")
        if checkpoint_every < 0:
            raise ValueError(f"checkpoint_every={checkpoint_every} must be at least 0; 0 keeps all activations, 1 recomputes every block")
        self.config = config
        self.model = Decoder(config, checkpoint_every=checkpoint_every)
        self.lm_head = LanguageModelHead(
            config.hidden_size, config.vocab_size, std=config.initializer_range, loss_chunk_tokens=loss_chunk_tokens
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); or, given labels, the sum of the token cross-entropies, nats, an fp32 scalar.

        Args:
            input_ids: (B, T) tokens, T at most `config.max_seq_len` (else ValueError).
            labels: (B, T), already shifted: `labels[i, j]` is the token that follows `input_ids[i, j]`; -100 does not count.
            document_ids: (B, T), a run of equal numbers is a document: attention stays inside it and positions start at 0 in it.
        """
        seq_len, max_seq_len = input_ids.shape[1], self.config.max_seq_len
        if seq_len > max_seq_len:
            raise ValueError(f"a sequence of {seq_len} tokens is longer than model.max_seq_len={max_seq_len}: cut it, or raise max_seq_len")
        return self.lm_head(self.model(input_ids, document_ids), labels)

    def next_logits(self, input_ids_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) of what follows the tokens in `cache` and `input_ids_BT`, which the cache takes up. For use without gradients."""
        return self.lm_head(self.model.continue_(input_ids_BT, cache)[:, -1])


def num_parameters(model: nn.Module) -> int:
    """Numbers in the model's parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def compile_blocks(model: LlamaForCausalLM, **options: Any) -> None:
    """Compile each decoder block in place with torch.compile; `options` are torch.compile's.

    The blocks share their code, so one compilation serves all and its time does not grow with depth. Parameter names do not change,
    as they would with `torch.compile(model)`.
    """
    for block in model.model.layers:
        block.compile(**options)
