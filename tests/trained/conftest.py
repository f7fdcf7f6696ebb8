"""One small run for all tests of this folder: grouped heads, a tokenizer of our own kind, two checkpoints with their evaluations."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.train_tokenizer import train_tokenizer
from ngpt.config.compose import compose_run
from ngpt.data.tokenizer import Tokenizer
from ngpt.train import train

WORDS = ["river", "mountain", "copper", "lantern", "whistle", "garden", "orbit", "thunder", "velvet", "marble", "café", "naïve"]
ENDINGS = ["", "s", "ing", "ed", "er", "ly", "ness", "ful"]


def prose(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) + generator.choice(ENDINGS) for _ in range(words)) + generator.choice([".", "!\n", ".\n\n"])


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its folder, the overrides that made it, and its tokenizer."""

    folder: Path
    overrides: list[str]
    tokenizer: Tokenizer

    def step(self, number: int) -> Path:
        return self.folder / "checkpoints" / f"step-{number:07d}"

    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def no_picture(*_args: object, **_kwargs: object) -> None:
    """In the place of `plot_run`, which takes longer than a small run."""


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("ngpt.summary.plot_run", no_picture)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """corpus.jsonl, and tokenizer.model trained on it."""
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    texts = [prose(generator, generator.choice([5, 20, 60])) for _ in range(200)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 320))
    return folder


@pytest.fixture(scope="session")
def train_small(text_folder) -> Callable[..., TrainedRun]:
    """`train_small(folder, *overrides)`: a run of 4 steps in `folder`/small."""
    settings = [
        "model=llama_9m",
        "model.vocab_size=320",
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=2",
        "model.max_seq_len=64",
        "model.initializer_range=0.2",
        "optimizer=adamw",
        "data=local_c4",
        f"data.train_files=[{text_folder}/corpus.jsonl]",
        f"tokenizer.path={text_folder}/tokenizer.model",
        "trainer.seq_len=24",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=4",
        "trainer.max_steps=4",
        "trainer.precision=fp32",
        "trainer.peak_flops=1e9",
        "trainer.loss_chunk_tokens=50",
        "scheduler.warmup_steps=1",
        "eval.max_tokens=150",
        "eval.every_steps=2",
        "checkpoint.every_steps=2",
        "logger.every_steps=1",
        "run.name=small",
    ]

    def run(folder: Path, *overrides: str) -> TrainedRun:
        arguments = [*settings, f"run.dir={folder}", *overrides]
        assert train(compose_run(arguments), arguments) == 0
        return TrainedRun(folder / "small", arguments, Tokenizer.load(text_folder / "tokenizer.model"))

    return run


@pytest.fixture(scope="session")
def small_run(train_small, tmp_path_factory) -> TrainedRun:
    """The run that all tests may read and none may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ngpt.summary.plot_run", no_picture)
        return train_small(tmp_path_factory.mktemp("runs"))
