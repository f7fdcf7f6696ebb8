"""Counting what torch's CPU allocator hands out and takes back, inside kernels and in all threads, for measurements of peak memory."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile


class AllocatedBytes:
    """A context in which every allocation on the CPU is recorded; afterwards `peak` is the most bytes of them at one time.

    What was allocated before does not count, also when it is freed inside.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> AllocatedBytes:
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profiler.__exit__(*error)
        events = self._profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        live = 0
        for _, size in changes:
            live += size
            self.peak = max(self.peak, live)


def peak_on_gpu(device: torch.device) -> int:
    """The most bytes of tensors since `torch.cuda.reset_peak_memory_stats`."""
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
