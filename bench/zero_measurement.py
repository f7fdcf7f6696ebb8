"""The measurements of bench/zero.py on one rank, and the processes in which they run."""

# FileStore is torch's documented store; it is not in the __all__ of torch.distributed.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from bench.live_bytes import LiveTensorBytes
from bench.wire_bytes import WireBytes
from bench.zero_contenders import Contender, Ours, Setup, construct, discard, is_block_matrix
from ngpt.dist.collectives import Collectives

TIMEOUT_MINUTES = 10  # of a collective


@dataclass
class Measured:
    """One contender at one stage, on one rank or the largest of all ranks. Bytes, and seconds of each round."""

    sent: int = 0  # in a step away from a refresh
    weights_sent: int = 0  # of these: to gather weights for forward and backward
    matrices_sent: int = 0  # without those: where only the blocks' matrices are trained
    matrices_sent_at_refresh: int = 0  # the same in the update in which all bases are found
    peak: int = 0  # of all that is alive in a step: weights, state, gradients, activations, buffers
    kept: int = 0  # between steps
    state: int = 0
    sharded_state: int = 0
    sharded_state_of_all: int = 0
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        """Seconds of whole steps."""
        return [backward + update for backward, update in zip(self.backward, self.update, strict=True)]

    @property
    def updates_sent(self) -> int:
        """Bytes of gradients and updates."""
        return self.sent - self.weights_sent


# ------------------------------------------------------------------------------------------------------- on every rank
def measure_stage(setup: Setup, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """`Measured`, as a dict, of every contender on this rank. Their timed steps take turns, in an order drawn anew in every round."""
    results = {name: Measured() for name in names}
    for name, result in results.items():
        result.matrices_sent_at_refresh, result.matrices_sent = matrix_bytes_sent(name, setup)
    contenders: dict[str, Contender] = {}
    for name, result in results.items():
        contenders[name] = warmed_up(name, setup, result)
    order, shuffle = list(names), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            backward, update = timed_step(contenders[name], setup)
            results[name].backward.append(backward)
            results[name].update.append(update)
    for contender in contenders.values():
        discard(contender, setup)
    return {name: asdict(result) for name, result in results.items()}


def matrix_bytes_sent(name: str, setup: Setup) -> tuple[int, int]:
    """Bytes of gradients and updates that this rank sends when nothing but the blocks' matrices is trained: at a refresh, and away from
    one."""
    contender = construct(name, Setup(**{**vars(setup), "matrices_only": True}))
    counts = []
    for _ in range(2):
        contender.weight_bytes_sent({})
        with WireBytes(Collectives()) as wire:
            contender.update(contender.backward())
        counts.append(wire.total - contender.weight_bytes_sent(wire.sent))
    discard(contender, setup)
    return counts[0], counts[1]


def warmed_up(name: str, setup: Setup, result: Measured) -> Contender:
    """The contender after three steps, of which the last one was counted: what is sent, and what is alive."""
    memory = LiveMemory(setup)
    with memory:
        contender = construct(name, setup)
    for _ in range(3):
        contender.weight_bytes_sent({})
        memory.begin()
        with memory, WireBytes(Collectives()) as wire:
            contender.update(contender.backward())
    result.peak, result.kept = memory.peak(), memory.kept()
    result.sent, result.weights_sent = wire.total, contender.weight_bytes_sent(wire.sent)
    state = contender.state_bytes()
    result.state, result.sharded_state, result.sharded_state_of_all = state.total, state.sharded, state.sharded_whole
    return contender


def timed_step(contender: Contender, setup: Setup) -> tuple[float, float]:
    """Seconds of forward and backward, with what is sent during it, and of the rest of the step."""
    wait = torch.cuda.synchronize if setup.device == "cuda" else lambda: None
    dist.barrier()
    wait()
    began = time.perf_counter()
    loss = contender.backward()
    wait()
    between = time.perf_counter()
    contender.update(loss)
    wait()
    return between - began, time.perf_counter() - between


class LiveMemory:
    """Bytes that a contender keeps alive, as a context around everything it does: counted on the CPU, the allocator's on a GPU."""

    def __init__(self, setup: Setup) -> None:
        self._count = LiveTensorBytes() if setup.device == "cpu" else None
        self._before = 0 if self._count else torch.cuda.memory_allocated()

    def __enter__(self) -> None:
        if self._count:
            self._count.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._count:
            self._count.__exit__(*error)

    def begin(self) -> None:
        """Start to look for a peak."""
        if self._count:
            self._count.peak = self._count.live
        else:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most since `begin`."""
        return self._count.peak if self._count else torch.cuda.max_memory_allocated() - self._before

    def kept(self) -> int:
        """What is alive now."""
        return self._count.live if self._count else torch.cuda.memory_allocated() - self._before


# ----------------------------------------------------------------------------------------------------------- gradients
class GradientPeaks(NamedTuple):
    """Most bytes at one time on a rank, in updates with and without a refresh."""

    full: int  # full gradients of the blocks' matrices, from the moment backward has finished each until it is freed
    held: int  # gradients, accumulators and buffers that the engine holds, whenever a gradient is born or the update begins
    tensors: int  # everything beyond weights and state (CPU only)


def measure_gradients(setup: Setup, names: list[str]) -> dict[str, dict[str, GradientPeaks]]:
    """Of each of our optimizers, deferred (two micro-batches) and immediate (one)."""
    return {
        name: {apply: gradient_peaks(name, Setup(**{**vars(setup), "apply": apply, "gap": 2})) for apply in ("deferred", "immediate")}
        for name in names
    }


def gradient_peaks(name: str, setup: Setup) -> GradientPeaks:
    """The peaks of three updates: the first and the third find a basis, the second does not."""
    full, tensors = LiveGradients(), 0
    contender = Ours(name, setup, watch=full.watch)
    full.held_by = contender.engine._gradients.live_bytes
    for _ in range(3):
        with LiveTensorBytes() as count:
            loss = contender.backward(micro_batches=2 if setup.apply == "deferred" else 1)
            outcome = contender.engine.finish_update(loss)
        full.held_peak, tensors = max(full.held_peak, outcome.gradient_bytes), max(tensors, count.peak)
    discard(contender, setup)
    return GradientPeaks(full.peak, full.held_peak, tensors)


class LiveGradients:
    """Counts the bytes of full gradients of the blocks' matrices that are alive, whoever holds them; and at each birth of a gradient what
    `held_by` says is held."""

    def __init__(self) -> None:
        self.live = self.peak = self.held_peak = 0
        self.held_by: Callable[[], int] = lambda: 0

    def watch(self, model: nn.Module) -> None:
        """Count those of this model. Call before others hook its parameters, so that every gradient is seen."""
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(functools.partial(self._born, counts=is_block_matrix(name)))

    def _born(self, parameter: Tensor, *, counts: bool) -> None:
        self.held_peak = max(self.held_peak, self.held_by())
        if not counts:
            return
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size


# ----------------------------------------------------------------------------------------------------------- processes
def on_ranks(size: int, device: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a top-level function returns on each rank, through JSON, in processes of one new group. Raises what a rank raises."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (size, device, folder, function, args), nprocs=size)
        return [json.loads(Path(folder, f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _run_rank(rank: int, size: int, device: str, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with _group(rank, size, device, folder):
        result = function(*args)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result), encoding="utf-8")


@contextlib.contextmanager
def _group(rank: int, size: int, device: str, folder: str) -> Iterator[None]:
    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in places.items()})  # for DeepSpeed; nobody goes to that address
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=TIMEOUT_MINUTES))
    dist.barrier()
    yield
    dist.destroy_process_group()
