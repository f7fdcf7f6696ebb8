"""Closed formulas for what a model of a given shape costs: parameters, bytes, floating-point operations; no torch needed."""

from __future__ import annotations

from typing import NamedTuple

from ngpt.config.schema import ModelConfig
from ngpt.config.shapes import block_matrices


class MatrixShape(NamedTuple):
    """A weight matrix as torch stores it: `rows` outputs, `columns` inputs."""

    name: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def projected(self) -> bool:
        """Whether the low-rank optimizers project its gradient: matrices of attention and MLP, not the embedding nor the head."""
        return ".self_attn." in self.name or ".mlp." in self.name


def num_key_value_heads(config: ModelConfig) -> int:
    """Key/value heads, `None` resolved to as many as query heads.

    Raises ValueError if the query heads cannot be shared out evenly among them.
    """
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if heads % key_value_heads:
        raise ValueError(
            f"model.num_attention_heads={heads} is not a multiple of model.num_key_value_heads={key_value_heads}: "
            "choose a divisor of the query heads, or null for as many"
        )
    return key_value_heads


def head_dim(config: ModelConfig) -> int:
    """Width of one attention head. Raises ValueError if the heads do not divide hidden_size, or leave an odd width (rotary needs pairs)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads or hidden // heads % 2:
        raise ValueError(
            f"model.hidden_size={hidden} over model.num_attention_heads={heads} is not an even number per head: "
            "rotary embeddings turn pairs of dimensions; change one of the two"
        )
    return hidden // heads


def matrix_shapes(config: ModelConfig) -> list[MatrixShape]:
    """Every matrix of the model, in the order of `named_parameters()`; a tied head is the embedding and not listed again."""
    hidden, key_value_width = config.hidden_size, num_key_value_heads(config) * head_dim(config)
    block = block_matrices(hidden=hidden, inner=config.intermediate_size, key_value=key_value_width)
    blocks = [
        MatrixShape(f"model.layers.{layer}.{name}.weight", rows, columns)
        for layer in range(config.num_hidden_layers)
        for name, (rows, columns) in block.items()
    ]
    head = [] if config.tie_word_embeddings else [MatrixShape("lm_head.weight", config.vocab_size, hidden)]
    return [MatrixShape("model.embed_tokens.weight", config.vocab_size, hidden), *blocks, *head]


def parameter_count(config: ModelConfig) -> int:
    """Trainable numbers of the model; a tied head counts once."""
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return sum(matrix.size for matrix in matrix_shapes(config)) + norms


def projected_parameter_count(config: ModelConfig) -> int:
    """The part of `parameter_count` in matrices of attention and MLP; the rest is embedding, head and norms."""
    return sum(matrix.size for matrix in matrix_shapes(config) if matrix.projected)


def adapter_parameter_count(config: ModelConfig, rank: int) -> int:
    """Numbers that LoRA adapters of this rank add to the matrices of attention and MLP, which they freeze."""
    return rank * sum(matrix.rows + matrix.columns for matrix in matrix_shapes(config) if matrix.projected)


def weight_bytes(config: ModelConfig, *, bytes_per_parameter: int = 2) -> int:
    """Bytes of the weights (2 per parameter: bf16; 4: fp32), without any master copy: that is optimizer state."""
    return parameter_count(config) * bytes_per_parameter


def flops_per_token(config: ModelConfig, seq_len: int, *, backward: bool = True, adapter_rank: int = 0) -> int:
    """Floating-point operations of the matrix products per token of a sequence of `seq_len` tokens.

    Two per multiply-add. Forward: each matrix once (the embedding is a look-up, the head a product), and in attention the
    scores and the weighted sum, 2 * 2 * seq_len * hidden per layer. Backward: twice the forward; with LoRA adapters (`adapter_rank` > 0)
    the matrices that they freeze only pass gradients on, once the forward. Counted as
    `torch.utils.flop_counter` counts: the whole square of scores although attention is causal. Not counted: recomputation (of
    checkpointed blocks, of the scores in a fused attention's backward), as the definition of model FLOPs utilisation
    wants it (PaLM, arXiv:2204.02311, appendix B); norms, activations, softmax and rotary embeddings.
    """
    in_blocks = projected_parameter_count(config)
    in_head = config.vocab_size * config.hidden_size
    in_attention = 2 * seq_len * config.num_attention_heads * head_dim(config) * config.num_hidden_layers
    forward = 2 * (in_blocks + in_head + in_attention + adapter_parameter_count(config, adapter_rank))
    frozen = 2 * in_blocks if adapter_rank else 0
    return 3 * forward - frozen if backward else forward
