"""A tiny run to break, and what it leaves behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from ngpt.config.compose import compose_run
from ngpt.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("broken_ranks.py")

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


class Left:
    """What a run in a folder has left: `records`, `weights` and `log`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tiny"

    def records(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "train/loss" in row]

    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.records()]

    def weights(self, step: int) -> dict[str, Any]:
        return load_file(self.folder / f"checkpoints/step-{step:07d}/model.safetensors")

    def log(self) -> str:
        return (self.folder / "train.log").read_text()

    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("checkpoints/step-*/.complete"))


@pytest.fixture(scope="session")
def left() -> type[Left]:
    return Left


@pytest.fixture
def tiny(tmp_path: Path) -> SimpleNamespace:
    """`run(*overrides, folder=...)` trains in this process as `settings` say; `records`, `weights` and `log` read what it left."""
    settings = [*TINY]  # for a test to change

    def run(*overrides: str, folder: Path = tmp_path) -> int:
        return train(compose_run([*settings, f"run.dir={folder}", *overrides]), [*settings, *overrides])

    return SimpleNamespace(
        run=run,
        records=lambda folder=tmp_path: Left(folder).records(),
        weights=lambda step, folder=tmp_path: Left(folder).weights(step),
        log=lambda folder=tmp_path: Left(folder).log(),
        settings=settings,
        folder=tmp_path / "tiny",
    )


@pytest.fixture(scope="session")
def rank_server() -> Iterator[Callable[[dict[str, Any]], list[int]]]:
    """The process that forks the ranks of runs that break, so that what a trainer imports is imported once: an order in, exit codes out."""
    reading, writing = os.pipe()
    with (
        os.fdopen(reading) as answers,
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(writing)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=[writing],
            stdin=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        ) as server,
    ):
        os.close(writing)

        def ask(order: dict[str, Any]) -> list[int]:
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            return json.loads(answers.readline())

        yield ask
        server.stdin.close()


@pytest.fixture(scope="session")
def break_ranks(
    rank_server: Callable[[dict[str, Any]], list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[SimpleNamespace]]:
    """`break_ranks(folder, breaks, *overrides, ranks=2, port=0)`: trains on some processes, of which some break; code and words of each."""

    def run(folder: Path, breaks: str = "", *overrides: str, ranks: int = 2, port: int = 0, seconds: float = 150) -> list[SimpleNamespace]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = port or free.getsockname()[1]
        said = tmp_path_factory.mktemp("said") / "rank"
        settings = [*TINY, "engine.timeout_seconds=20", f"run.dir={folder}", *overrides]
        order = {"ranks": ranks, "settings": settings, "port": port, "said": str(said), "breaks": breaks.split(), "seconds": seconds}
        codes = rank_server(order)
        words = [Path(f"{said}-{rank}").read_text(errors="replace") for rank in range(ranks)]
        return [SimpleNamespace(code=code, said=text) for code, text in zip(codes, words, strict=True)]

    return run
