"""Out of memory, said with what is known of it: who holds how much, and which settings free most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ngpt.config.schema import RunConfig
from ngpt.planning.fit import GIB, remedies
from ngpt.planning.memory import estimate_memory

_ANOTHER = " (in another run: run.name=...)"

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
    trainer, on_gpu = config.trainer, device.type == "cuda"
    plan = estimate_memory(config, ranks=world_size, on_gpu=on_gpu)
    known = {"weights": (sizes or {}).get("weights", 0), "optimizer state": (sizes or {}).get("optimizer_state", 0)}
    lines = [f"{name} {size / GIB:.2f} GiB" for name, size in known.items() if size]
    activations = plan.largest["activations"] + plan.largest["logits"]
    lines.append(f"activations of {trainer.micro_batch_size} x {trainer.seq_len} tokens about {activations / GIB:.2f} GiB")
    lines.append(f"planned peak {plan.peak.total / GIB:.2f} GiB of tensors, at {plan.peak.name}")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        lines.append(f"allocated {allocated / GIB:.2f} of {total / GIB:.2f} GiB, {free / GIB:.2f} GiB free for all processes")
    advice = remedies(config, ranks=world_size, on_gpu=on_gpu)
    settings = [f"  {r.overrides}: {r.price}{'' if r.same else _ANOTHER}  (about {r.saved / GIB:.2f} GiB less)" for r in advice]
    return "\n".join(
        [
            f"out of memory on {device}, {when}: {'; '.join(lines)}",
            "what frees memory, most first:",
            *(settings or ["  a smaller model, or a device with more memory"]),
        ]
    )
