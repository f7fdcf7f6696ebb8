"""Results as flat records of numbers: one name and one unit for each metric, the same in metrics.jsonl, on the console and in W&B."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import psutil
import torch

from ngpt.config.devices import gpu_of
from ngpt.loop.evaluate import EvalResult, perplexity
from ngpt.loop.train_step import StepResult

GIB = 2**30
Record = dict[str, float | int | None]
_SHORTEST_SECONDS = 1e-9  # of an interval: a clock that stands still must not divide by zero


class StepMetrics:
    """Turns StepResults into records. Rates are means over all steps since the last record, evaluation and saving left out."""

    def __init__(self, *, flops_per_token: float, peak_flops: float, world_size: int) -> None:
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._world_size = world_size
        self._tokens = 0
        self._step_seconds: list[float] = []
        self._data_seconds: list[float] = []

    def add(self, result: StepResult) -> None:
        """Count a step that may or may not get a record of its own."""
        self._tokens += result.step_tokens
        self._step_seconds.append(result.step_seconds)
        self._data_seconds.append(result.data_seconds)

    def record(
        self,
        result: StepResult,
        *,
        state_bytes: Mapping[str, int],
        memory: Mapping[str, float],
        sources: Mapping[str, float],
        communication: Mapping[str, int],
    ) -> Record:
        """The record of the step just added; starts the next interval.

        Args:
            state_bytes: `weights`, `optimizer_state` and the latter's parts, in bytes.
            memory: `allocated`, `peak_allocated`, `peak_reserved`, in bytes.
            sources: counters of the data pipeline.
            communication: bytes that this rank sent to others since the last record, by what for; empty without others.
        """
        update = result.update
        steps, seconds = len(self._step_seconds), max(sum(self._step_seconds), _SHORTEST_SECONDS)
        tokens_per_second = self._tokens / seconds
        per_device = tokens_per_second / self._world_size
        record: Record = {
            "step": result.step,
            "tokens": result.tokens,
            "train/loss": _finite(update.loss),
            "train/perplexity": _finite(perplexity(update.loss)),
            "train/loss_spikes": result.loss_spikes,
            "train/rollbacks": result.rollbacks,
            "optim/lr": update.lr,
            "optim/grad_norm": _finite(update.grad_norm),
            "optim/applied_grad_norm": _finite(update.applied_grad_norm),
            "optim/skipped_steps": result.skipped_steps,
            "throughput/tokens_per_sec": tokens_per_second,
            "throughput/tokens_per_sec_per_device": per_device,
            "throughput/mfu": per_device * self._flops_per_token / self._peak_flops,
            "time/step_s": seconds / steps,
            "time/data_s": sum(self._data_seconds) / steps,
            "memory/weights_gib": state_bytes["weights"] / GIB,
            "memory/gradients_gib": update.gradient_bytes / GIB,
            "memory/optimizer_state_gib": state_bytes["optimizer_state"] / GIB,
        }
        parts = {name: count for name, count in state_bytes.items() if name not in ("weights", "optimizer_state")}
        record |= {f"memory/optimizer_{name}_gib": count / GIB for name, count in parts.items()}
        record |= {f"memory/{name}_gib": count / GIB for name, count in memory.items()}
        record |= {f"data/{name}": count for name, count in sources.items()}
        if communication:
            record["comm/bytes_per_step"] = sum(communication.values()) / steps
            record |= {f"comm/{name}_bytes_per_step": count / steps for name, count in communication.items()}
        self._tokens, self._step_seconds, self._data_seconds = 0, [], []
        return record


def eval_record(step: int, tokens: int, result: EvalResult, *, seconds: float) -> Record:
    """The record of one evaluation."""
    record: Record = {
        "step": step,
        "tokens": tokens,
        "val/loss": _finite(result.loss),
        "val/perplexity": _finite(result.perplexity),
        "val/perplexity_galore_protocol": _finite(result.perplexity_galore_protocol),
        "val/tokens": result.tokens,
        "time/eval_s": seconds,
    }
    if result.bits_per_byte is not None:
        record["val/bits_per_byte"] = _finite(result.bits_per_byte)
    return record


def device_memory(device: torch.device) -> dict[str, float]:
    """Bytes in use now and at the highest: the CUDA allocator's counts, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "peak_allocated": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"allocated": psutil.Process().memory_info().rss, "peak_allocated": peak, "peak_reserved": peak}


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the MFU is a share of: the data sheet's for a known GPU, else what a large matrix product reaches here and now."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        gpu = gpu_of(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.bf16
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):  # the best of a few: other work on the machine only ever slows it
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: they become null."""
    return value if abs(value) != float("inf") and value == value else None
