"""Out of memory, said with what is known of it: who holds how much, and which settings free most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ngpt.config.optimizers import LowRankConfig
from ngpt.config.schema import RunConfig, checkpointing_interval
from ngpt.model.cost import num_key_value_heads
from ngpt.telemetry.metrics import GIB

_SNAPSHOT_ENTRIES = 200_000  # allocations that are remembered, the last ones


class OutOfMemory(RuntimeError):
    """The device's memory is too small for these settings; the text says what takes how much and what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what torch or Python raises when memory runs out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))


@contextmanager
def explained(describe: Callable[[], str], *, snapshot: Path | None = None) -> Iterator[None]:
    """Turn running out of memory within the body into OutOfMemory with the text of `describe`.

    With `snapshot`, a file to write: torch records all the while who allocates memory on the GPU, and then writes that record.
    """
    if snapshot:
        torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lines = [describe(), f"  ({str(error).splitlines()[0] if str(error) else type(error).__name__})"]
        if snapshot:
            lines.append(_dump(snapshot))
        raise OutOfMemory("\n".join(lines)) from error
    finally:
        if snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)


def _dump(snapshot: Path) -> str:
    """Write the record of allocations, and say where it is, or why it is not."""
    try:
        torch.cuda.memory._dump_snapshot(str(snapshot))
    except Exception as error:  # the message about memory matters more
        return f"the memory snapshot {snapshot} could not be written: {error}"
    return f"memory snapshot: {snapshot}, a pickle that https://pytorch.org/memory_viz shows"


def description(config: RunConfig, sizes: dict[str, int] | None, *, world_size: int, device: torch.device, when: str) -> str:
    """The message: what takes how much on this rank, and what to change, in the order of effect.

    Args:
        sizes: bytes of `weights` and `optimizer_state`, where they were allocated already.
        when: what was being done.
    """
    trainer = config.trainer
    activations, logits = activation_bytes(config), _logit_bytes(config)
    known = {"weights": (sizes or {}).get("weights", 0), "optimizer state": (sizes or {}).get("optimizer_state", 0)}
    lines = [f"{name} {size / GIB:.2f} GiB" for name, size in known.items() if size]
    lines.append(f"activations of {trainer.micro_batch_size} x {trainer.seq_len} tokens about {(activations + logits) / GIB:.2f} GiB")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        lines.append(f"allocated {allocated / GIB:.2f} of {total / GIB:.2f} GiB, {free / GIB:.2f} GiB free for all processes")
    advice = sorted(_advice(config, known["weights"], known["optimizer state"], world_size), reverse=True)
    remedies = [f"  {setting}  (about {saved / GIB:.2f} GiB less)" for saved, setting in advice if saved > 0]
    return "\n".join(
        [
            f"out of memory on {device}, {when}: {'; '.join(lines)}",
            "what frees memory, most first:",
            *(remedies or ["  a smaller model, or a device with more memory"]),
        ]
    )


def activation_bytes(config: RunConfig, *, every: int | None = None) -> int:
    """What forward keeps for backward, about: the tensors that a block's backward reads, for one micro-batch.

    Per token and block: two norms' inputs and outputs, the attention's queries, keys, values and output, and gate, up, their activation
    and product. A recomputed block keeps its input, and one block's tensors exist while it is recomputed. `every` is the
    number of blocks per recomputed block, None for what `trainer.activation_checkpointing` says.
    """
    model, trainer = config.model, config.trainer
    tokens = trainer.micro_batch_size * trainer.seq_len
    key_value = model.hidden_size * num_key_value_heads(model) // model.num_attention_heads
    block = 6 * model.hidden_size + 2 * key_value + 4 * model.intermediate_size
    every = checkpointing_interval(trainer) if every is None else every
    recomputed = 0 if not every else -(-model.num_hidden_layers // every)
    kept = (model.num_hidden_layers - recomputed + (recomputed > 0)) * block + recomputed * model.hidden_size
    return tokens * kept * (4 if trainer.precision == "fp32" else 2)


def _logit_bytes(config: RunConfig) -> int:
    """Logits of a chunk and their gradient, in fp32."""
    trainer = config.trainer
    return 2 * 4 * min(trainer.loss_chunk_tokens, trainer.micro_batch_size * trainer.seq_len) * config.model.vocab_size


def _advice(config: RunConfig, weights: int, state: int, world_size: int) -> Iterator[tuple[int, str]]:
    """Bytes that a change of settings would free, about, and the change."""
    trainer, engine, optimizer = config.trainer, config.engine, config.optimizer
    activations, logits = activation_bytes(config), _logit_bytes(config)
    if trainer.micro_batch_size > 1:
        half = trainer.micro_batch_size // 2
        while trainer.global_batch_size % (half * world_size):
            half -= 1
        saved = activations * (trainer.micro_batch_size - half) // trainer.micro_batch_size
        yield saved, f"trainer.micro_batch_size={half}: the same training in more micro-batches"
    if trainer.activation_checkpointing != "full":
        saved = activations - activation_bytes(config, every=1)
        yield saved, "trainer.activation_checkpointing=full: a third more computation"
    if trainer.loss_chunk_tokens > 128:
        yield logits * 3 // 4, f"trainer.loss_chunk_tokens={trainer.loss_chunk_tokens // 4}: the same numbers"
    if optimizer.apply == "whole":
        yield weights * 3 // 4, "optimizer.apply=deferred: gradients are projected layer by layer"
    if trainer.precision == "fp32":
        yield weights // 2 + activations // 2, "trainer.precision=bf16 (in another run: run.name=...)"
    if world_size > 1 and engine.zero_stage < 3:
        saved = weights * (world_size - 1) // world_size + (0 if engine.zero_stage else state * (world_size - 1) // world_size)
        yield saved, "engine.zero_stage=3: weights are divided among processes"
    if not engine.offload_optimizer and world_size > 1:
        yield state, "engine.offload_optimizer=true: optimizer state in the CPU's memory"
    if optimizer.state_dtype != "8bit":
        yield state * 3 // 4, "optimizer.state_dtype=8bit (in another run: run.name=...)"
    if isinstance(optimizer, LowRankConfig) and optimizer.rank > 1:
        yield state // 3, f"optimizer.rank={optimizer.rank // 2} (in another run: run.name=...)"
