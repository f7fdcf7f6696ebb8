"""A tiny run to break, and what it leaves behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from ngpt.config.compose import compose_run
from ngpt.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("broken_rank.py")

TINY = [
    "model=llama_9m",
    "model.vocab_size=128",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data=synthetic",
    "data.document_tokens=40",
    "data.shuffle_window=8",
    "optimizer=galore",
    "optimizer.rank=8",
    "optimizer.update_proj_gap=3",
    "trainer.seq_len=32",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.max_steps=8",
    "trainer.precision=fp32",
    "trainer.peak_flops=1e9",
    "scheduler.warmup_steps=2",
    "eval.max_tokens=300",
    "eval.every_steps=4",
    "checkpoint.every_steps=0",
    "logger.every_steps=1",
    "run.name=tiny",
]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ngpt.summary.plot_run", lambda *_args, **_kwargs: None)


@pytest.fixture
def tiny(tmp_path: Path) -> SimpleNamespace:
    """`run(*overrides, folder=...)` trains in this process; `records`, `weights` and `log` read what it left."""

    def run(*overrides: str, folder: Path = tmp_path) -> int:
        return train(compose_run([*TINY, f"run.dir={folder}", *overrides]), [*TINY, *overrides])

    def records(folder: Path = tmp_path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "tiny/metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "train/loss" in row]

    def weights(step: int, folder: Path = tmp_path) -> dict[str, Any]:
        return load_file(folder / f"tiny/checkpoints/step-{step:07d}/model.safetensors")

    def log(folder: Path = tmp_path) -> str:
        return (folder / "tiny/train.log").read_text()

    return SimpleNamespace(run=run, records=records, weights=weights, log=log, settings=TINY, folder=tmp_path / "tiny")


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[..., list[SimpleNamespace]]:
    """`two_ranks(fault, *overrides, folder=...)`: trains on two processes of which some break; code and words of each."""

    def run(fault: str, *overrides: str, folder: Path = tmp_path, timeout: float = 180) -> list[SimpleNamespace]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        settings = [*TINY, "engine.timeout_seconds=20", f"run.dir={folder}", *overrides]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "BREAK": fault, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), *settings],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=REPOSITORY,
            )
            for rank in range(2)
        ]
        try:
            said = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [SimpleNamespace(code=process.returncode, said=text) for process, text in zip(processes, said, strict=True)]

    return run
