"""The planned peak is what the real engine allocates, counted by the allocator, over shapes, methods, modes and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.allocated_bytes import AllocatedBytes
from bench.plan_accuracy import SETTINGS, measured_peak
from ngpt.config.compose import compose_run
from ngpt.planning.memory import estimate_memory

WITHIN = 0.10


@pytest.mark.parametrize("name", [name for name, case in SETTINGS.items() if case.in_tests])
def test_the_planned_peak_is_within_a_tenth_of_what_is_allocated(name: str) -> None:
    config = compose_run(["data=synthetic", *SETTINGS[name].overrides], check_files=False)
    measured = measured_peak(config, torch.device("cpu"))
    planned = estimate_memory(config, on_gpu=False).peak
    assert abs(planned.total / measured - 1) <= WITHIN, (measured, planned)


def test_the_count_sees_kernels_threads_and_what_is_freed() -> None:
    with AllocatedBytes() as count:
        first = torch.ones(1000)
        x = torch.ones(500, requires_grad=True)
        del first
        (x * torch.ones(500)).sum().backward()
    assert 4000 <= count.peak < 4000 + 4 * 500 * 4


def _peaks_on_ranks(settings: list[str], ranks: int) -> tuple[int, int]:
    config = compose_run(["data=synthetic", *settings], world_size=ranks, check_files=False)
    return measured_peak(config, torch.device("cpu")), estimate_memory(config, ranks=ranks, on_gpu=False).peak.total


@pytest.mark.slow
def test_so_it_is_under_zero_on_two_processes(on_ranks: Any) -> None:
    for stage in (1, 2, 3):
        for settings in (["optimizer=adamw"], ["optimizer=galore", "optimizer.rank=16"], ["optimizer=natural_galore", "optimizer.rank=16"]):
            model = ["model=llama_9m", "model.vocab_size=512", "trainer.seq_len=128", "trainer.micro_batch_size=4"]
            shared = ["trainer.global_batch_size=8", "trainer.max_steps=1", f"engine.zero_stage={stage}", "trainer.precision=fp32"]
            measured, planned = on_ranks(2, _peaks_on_ranks, [*model, *shared, *settings], 2)[0]
            assert abs(planned / measured - 1) <= WITHIN, (stage, settings, measured, planned)
