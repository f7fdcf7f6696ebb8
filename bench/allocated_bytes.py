"""Counting what torch's CPU allocator hands out and takes back, inside kernels and in all threads, for measurements of peak memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class AllocatedBytes:
    """A context in which every allocation on the CPU is recorded; afterwards `peak` is the most bytes of them at one time.

    What was allocated before does not count, also when it is freed inside. Between ranks a thread of gloo may be the last to let go of
    a buffer, and when it does depends on the machine: what it still holds counts.
    """

    def __init__(self) -> None:
        self.peak = 0
        _watch_all_threads()
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> AllocatedBytes:
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profiler.__exit__(*error)
        tree = self._profiler.profiler.kineto_results.experimental_event_tree()  # pyright: ignore[reportOptionalMemberAccess]
        changes = sorted(_changes(tree))
        if not changes:
            return
        # The total knows of blocks that other threads free, events do not; of blocks of an earlier count, which it knows too, events do.
        _, _, first, total = changes[0]
        before, own = total - first, set[int]()
        for _, address, size, total in changes:
            if size > 0:
                own.add(address)
            elif address in own:
                own.discard(address)
            else:
                before += size
            self.peak = max(self.peak, total - before)


def _watch_all_threads() -> None:
    """Let the allocator's total include threads that no profiler follows: else what they free would stay in it for ever."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def _changes(nodes: list[Any]) -> Iterator[tuple[int, int, int, int]]:
    """When, at which address, how many bytes more or less, and how many there are then, from the profiler's tree of events."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        waiting += node.children
        kind, fields = node.typed
        if kind == _EventType.Allocation and fields.device.type == "cpu":
            yield node.start_time_ns, fields.ptr, fields.alloc_size, fields.total_allocated


def peak_on_gpu(device: torch.device) -> int:
    """The most bytes of tensors since `torch.cuda.reset_peak_memory_stats`."""
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
