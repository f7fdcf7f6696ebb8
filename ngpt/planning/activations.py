"""What forward keeps for backward and what backward needs on top, in bytes, for one micro-batch: closed formulas, held to counts by tests.

Letters: t tokens of a micro-batch, H hidden size, M intermediate size, N heads, V vocabulary, T tokens of a row, w bytes of a weight.

A block keeps for each token: the inputs of its two norms, their results before and after the weight, queries, keys and values as attention
takes them (keys and values repeated for every query head), the output of attention; gate, up, silu(gate) and their product:

    t w (10 H + 4 M)  +  4 t (N + 2)                                                     (1)

the last term being fp32: the logarithms of the sums of attention's rows, and the scales of the norms. So it is with the fused kernels of
a GPU; on the CPU a norm is made of plain operations, which keep their input in fp32. Scores are kept nowhere: attention is fused on both.
With borders between documents each block keeps the mask, T numbers a token, in the dtype of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from ngpt.config.optimizers import LoRAConfig
from ngpt.config.schema import RunConfig, checkpointing_interval
from ngpt.model.cost import matrix_shapes

FP32 = 4
INT64 = 8


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Args:
        blocks: what each block keeps from forward to its backward, in the order of the model.
        recomputed: what each block's recomputation adds while its backward runs: 0 for blocks that keep everything.
        shared: tokens, rotary tables and the mask: there from the first block's forward to its backward.
        output: what the last norm keeps, and its result, which the head reads.
        loss: the most that the head and its loss need beside them: the logits of a chunk, the gradient of the hidden states.
        hidden_gradient: what remains of that when backward starts.
        norm_backward: what the backward of a norm needs on top of what the blocks before it keep.
        feed_forward_backward: what a block's backward needs on top of what the blocks up to it keep, when gate and up are left.
    """

    blocks: tuple[int, ...]
    recomputed: tuple[int, ...]
    shared: int
    output: int
    logits: int
    hidden_gradient: int
    norm_backward: int
    feed_forward_backward: int


def activations_of(config: RunConfig, *, bytes_per_weight: int, on_gpu: bool) -> Activations:
    """The formulas for a run."""
    model, trainer, w = config.model, config.trainer, bytes_per_weight
    tokens, hidden = trainer.micro_batch_size * trainer.seq_len, model.hidden_size
    stream = tokens * w * hidden
    norm_input = stream if on_gpu else tokens * FP32 * hidden
    every = checkpointing_interval(trainer)
    kept = _kept_by_block(config, w, norm_input)
    checkpointed = [bool(every) and layer % every == 0 for layer in range(model.num_hidden_layers)]
    return Activations(
        blocks=tuple(stream if again else kept for again in checkpointed),
        recomputed=tuple(kept - (norm_input if on_gpu or w == FP32 else 0) if again else 0 for again in checkpointed),
        shared=_shared(config),
        output=norm_input + 2 * stream + tokens * FP32,
        logits=_logits(config, w, on_gpu=on_gpu),
        hidden_gradient=stream,
        # On the CPU a norm's backward is made of plain operations in fp32, six arrays of them at one time.
        norm_backward=4 * stream if on_gpu else 6 * tokens * FP32 * hidden + stream,
        feed_forward_backward=stream + 2 * tokens * w * model.intermediate_size,
    )


def _kept_by_block(config: RunConfig, w: int, norm_input: int) -> int:
    """(1), and what adapters add."""
    model, trainer = config.model, config.trainer
    tokens = trainer.micro_batch_size * trainer.seq_len
    kept = (
        2 * norm_input
        + tokens * w * (8 * model.hidden_size + 4 * model.intermediate_size)
        + tokens * FP32 * (model.num_attention_heads + 2)
    )
    if masks_documents(config):
        kept += tokens * trainer.seq_len * w
    if isinstance(config.optimizer, LoRAConfig):
        matrices = sum(matrix.projected for matrix in matrix_shapes(model)) // model.num_hidden_layers
        kept += tokens * w * config.optimizer.rank * matrices
    return kept


def masks_documents(config: RunConfig) -> bool:
    """Whether attention gets a mask."""
    return config.data.mask_documents and config.data.packing == "pack"


def _shared(config: RunConfig) -> int:
    model, trainer = config.model, config.trainer
    tokens = trainer.micro_batch_size * trainer.seq_len
    masked = masks_documents(config)
    tables = (tokens if masked else trainer.seq_len) * FP32 * (model.hidden_size // model.num_attention_heads)
    mask = tokens * trainer.seq_len if masked and checkpointing_interval(trainer) else 0  # else gone after forward
    return (3 if masked else 2) * tokens * INT64 + tables + mask


def _logits(config: RunConfig, w: int, *, on_gpu: bool) -> int:
    """The most beside the gradients of hidden states and head: two chunks of logits in fp32, or one and what is added to the head's sum.

    The CPU widens a narrow product as a whole before it adds it to an fp32 sum.
    """
    model, trainer = config.model, config.trainer
    positions = trainer.micro_batch_size * trainer.seq_len
    chunk = min(positions, trainer.loss_chunk_tokens) * model.vocab_size
    of_product = 0 if positions <= trainer.loss_chunk_tokens or w == FP32 else w if on_gpu else w + FP32
    product = model.vocab_size * model.hidden_size * of_product
    return max(2 * FP32 * chunk, w * chunk + product)


def head_gradient_bytes(config: RunConfig, w: int) -> int:
    """Bytes of the head's gradient while the loss adds it up: in fp32 over several chunks."""
    model, trainer = config.model, config.trainer
    several = trainer.micro_batch_size * trainer.seq_len > trainer.loss_chunk_tokens
    return model.vocab_size * model.hidden_size * (FP32 if several else w)
