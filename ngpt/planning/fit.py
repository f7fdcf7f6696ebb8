"""What fits on a card, and what would make it fit: other settings, each planned anew and checked as a run's are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ngpt.config.optimizers import LoRAConfig, LowRankConfig
from ngpt.config.problems import ConfigError
from ngpt.config.schema import RunConfig
from ngpt.config.validate import validate
from ngpt.planning.memory import MemoryEstimate, estimate_memory

GIB = 2**30
CARDS_GB = (8, 16, 24, 40, 80, 141)
VISIBLE = 0.985  # of the memory on the box is what the driver gives to programs
CONTEXT = 0.75 * GIB  # assumed: CUDA's context and kernels, and workspaces of cuBLAS and of the collectives
UNUSED = 0.04  # assumed: share of the peak that the allocator holds between tensors


class Remedy(NamedTuple):
    """Settings that lower the peak by `saved` bytes; `same` training, or another."""

    overrides: str
    saved: int
    price: str
    same: bool
    config: RunConfig


def needed(estimate: MemoryEstimate) -> float:
    """Bytes that a card must give: the peak of tensors, and what is assumed to come on top."""
    return estimate.peak.total * (1 + UNUSED) + CONTEXT


def fits(estimate: MemoryEstimate, gigabytes: float) -> bool:
    """Whether a card of so many GB, as printed on the box, is enough."""
    return needed(estimate) <= VISIBLE * gigabytes * GIB


def largest_micro_batch(config: RunConfig, gigabytes: float, *, ranks: int) -> int | None:
    """The largest trainer.micro_batch_size that fits, the global batch being what it is; None if not even one sequence does."""
    rows = config.trainer.global_batch_size // ranks
    each = (1,) if config.optimizer.apply == "immediate" else range(1, rows + 1)  # there it has to be the whole batch
    for accumulation in each:
        if rows % accumulation == 0:
            size = rows // accumulation
            if fits(estimate_memory(_with(config, "trainer", micro_batch_size=size), ranks=ranks), gigabytes):
                return size
    return None


def remedies(config: RunConfig, *, ranks: int, on_gpu: bool = True) -> list[Remedy]:
    """Every change of one kind of setting that lowers the peak, those that lower it most first."""
    peak = estimate_memory(config, ranks=ranks, on_gpu=on_gpu).peak.total
    found = []
    for overrides, price, same, changed in _changes(config, ranks):
        try:
            validate(changed, world_size=ranks, check_files=False)
        except ConfigError:
            continue
        saved = peak - estimate_memory(changed, ranks=ranks, on_gpu=on_gpu).peak.total
        if saved > 0.001 * peak:
            found.append(Remedy(overrides, saved, price, same, changed))
    return sorted(found, key=lambda remedy: -remedy.saved)


def what_fits(config: RunConfig, gigabytes: float, *, ranks: int) -> tuple[list[Remedy], MemoryEstimate]:
    """Changes, one after the other, until the card is enough: first those that keep the training what it is. With the last estimate.

    It may still not fit, when no change is left.
    """
    taken: list[Remedy] = []
    estimate = estimate_memory(config, ranks=ranks)
    while not fits(estimate, gigabytes):
        left = remedies(config, ranks=ranks)
        best = next((remedy for same in (True, False) for remedy in left if remedy.same is same), None)
        if best is None:
            break
        config = best.config
        taken = [remedy for remedy in taken if remedy.overrides.partition("=")[0] != best.overrides.partition("=")[0]] + [best]
        estimate = estimate_memory(config, ranks=ranks)
    return taken, estimate


def _changes(config: RunConfig, ranks: int) -> Iterator[tuple[str, str, bool, RunConfig]]:
    """Overrides, their price, whether the training stays the same, and the configuration with them."""
    trainer, optimizer = config.trainer, config.optimizer
    smaller = next((size for size in range(trainer.micro_batch_size // 2, 0, -1) if trainer.global_batch_size % (size * ranks) == 0), None)
    if smaller:
        changed = _with(config, "trainer", micro_batch_size=smaller)
        yield f"trainer.micro_batch_size={smaller}", "more micro-batches", True, changed
    if trainer.activation_checkpointing != "full":
        changed = _with(config, "trainer", activation_checkpointing="full")
        yield "trainer.activation_checkpointing=full", "a third more computation", True, changed
    if trainer.loss_chunk_tokens > 256:
        size = trainer.loss_chunk_tokens // 4
        yield f"trainer.loss_chunk_tokens={size}", "smaller products in the loss", True, _with(config, "trainer", loss_chunk_tokens=size)
    for apply, price in (("deferred", "none"), ("immediate", "no clipping, no accumulation")):
        if optimizer.apply not in (apply, "immediate"):
            yield f"optimizer.apply={apply}", price, True, _with(config, "optimizer", apply=apply)
    if optimizer.apply == "deferred" and trainer.precision != "fp32":
        changed = _with(config, "optimizer", apply="whole")
        yield "optimizer.apply=whole", "micro-batches are added up in bf16 instead of fp32", False, changed
    if ranks > 1 and config.engine.zero_stage < 3:
        for stage in range(config.engine.zero_stage + 1, 4):
            yield f"engine.zero_stage={stage}", "more traffic between ranks", True, _with(config, "engine", zero_stage=stage)
    if ranks > 1 and not config.engine.offload_optimizer:
        changed = _with(config, "engine", offload_optimizer=True)
        yield "engine.offload_optimizer=true", "updates on the CPU", True, changed
    if optimizer.state_dtype != "8bit":
        for dtype in {"fp32": ("bf16", "8bit"), "bf16": ("8bit",)}[optimizer.state_dtype]:
            yield f"optimizer.state_dtype={dtype}", "rounded moments", False, _with(config, "optimizer", state_dtype=dtype)
    if isinstance(optimizer, LowRankConfig):
        if not optimizer.embeddings:
            yield "optimizer.embeddings=true", "embedding and head projected", False, _with(config, "optimizer", embeddings=True)
        if getattr(optimizer, "fisher", None) == "diagonal":
            changed = _with(config, "optimizer", fisher="factored")
            yield "optimizer.fisher=factored", "a Fisher of the projected gradient only", False, changed
    if isinstance(optimizer, LowRankConfig | LoRAConfig) and optimizer.rank > 1:
        rank = optimizer.rank // 2
        yield f"optimizer.rank={rank}", "a smaller subspace", False, _with(config, "optimizer", rank=rank)
    if trainer.precision == "fp32":
        yield "trainer.precision=bf16", "weights in bf16, rounded stochastically", False, _with(config, "trainer", precision="bf16")


def _with(config: RunConfig, section: str, **values: object) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def total_saved(taken: Iterable[Remedy]) -> int:
    """Bytes that changes save one after the other."""
    return sum(remedy.saved for remedy in taken)
