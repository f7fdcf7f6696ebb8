"""Folders of runs as a run writes them, with numbers that a test can foretell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WriteRun = Callable[..., Path]


def records(steps: int, *, loss: float = 3.0, every: int = 10) -> list[dict[str, Any]]:
    """Records of steps 1, 10, 20, ..., and of an evaluation each 50 steps: the loss falls by 1/step to `loss`."""
    found: list[dict[str, Any]] = []
    for step in [1, *range(every, steps + 1, every)]:
        common = {"step": step, "tokens": step * 2048}
        now = loss + 5 / step
        found.append(
            common
            | {
                "train/loss": now,
                "train/perplexity": 2.0**now,
                "train/loss_spikes": 0,
                "optim/lr": 0.01 * (1 - step / (steps + 1)),
                "optim/grad_norm": 1 + 1 / step,
                "optim/skipped_steps": 0,
                "throughput/tokens_per_sec": 1000.0 + step,
                "throughput/tokens_per_sec_per_device": 500.0 + step / 2,
                "throughput/mfu": 0.4,
                "time/step_s": 2.0,
                "time/data_s": 0.001,
                "memory/weights_gib": 1.5,
                "memory/gradients_gib": 0.5,
                "memory/optimizer_state_gib": 0.75,
                "memory/optimizer_basis_gib": 0.25,
                "memory/optimizer_moments_gib": 0.5,
                "memory/allocated_gib": 4.0,
                "memory/peak_allocated_gib": 6.25,
                "memory/peak_reserved_gib": 7.5,
            }
        )
        if step % 50 == 0:
            found.append(common | {"val/loss": now + 0.5, "val/perplexity": 100 / step, "val/bits_per_byte": now / 3})
    return found


def lines_of(items: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes a run: `write_run("runs/a", records, optimizer={"name": "adamw"})` and returns its folder."""

    def write(place: str, items: list[dict[str, Any]], *, name: str | None = None, **sections: Any) -> Path:
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        config = {"run": {"name": name or folder.name, "dir": "runs"}, "trainer": {"max_steps": 200, "seq_len": 128}} | sections
        start = {
            "time": "2026-01-02T03:04:05+00:00",
            "argv": ["experiment=quickstart", "run.name=two words"],
            "resumed_from": None,
            "versions": {"python": "3.11.2", "torch": "2.9.9"},
            "platform": "Linux-6",
            "device": "cpu, 2 threads",
            "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "modified": True},
            "config": config,
        }
        (folder / "metrics.jsonl").write_text(lines_of(items), encoding="utf-8")
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        (folder / "manifest.json").write_text(json.dumps({"starts": [start]}), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def make_records() -> Callable[..., list[dict[str, Any]]]:
    return records
