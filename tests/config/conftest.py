"""A valid configuration to break, one rule at a time."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from ngpt.config.compose import compose_run
from ngpt.config.schema import RunConfig
from ngpt.config.validate import ConfigError, validate


@pytest.fixture(scope="session")
def _synthetic() -> RunConfig:
    return compose_run(["data=synthetic", "trainer.max_steps=100"])


@pytest.fixture
def config(_synthetic: RunConfig) -> RunConfig:
    """LLaMA 60M on synthetic text with Natural GaLore: valid, and the test's own."""
    return copy.deepcopy(_synthetic)


@pytest.fixture
def problems_of() -> Callable[..., list[str]]:
    """The lines that `validate` raises; empty for a valid configuration."""

    def problems(config: RunConfig, **keywords: object) -> list[str]:
        try:
            validate(config, **keywords)
        except ConfigError as error:
            return error.problems
        return []

    return problems


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_model(**options: object) -> bytes:
    """A small SentencePiece model of 300 pieces, with an EOS unless `options` say otherwise."""
    model = io.BytesIO()
    sentences = [f"river mountain {word} lantern" for word in ("copper", "whistle", "garden", "orbit")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """The contents of a SentencePiece .model file."""
    return train_model()


@pytest.fixture(scope="session")
def model_without_eos() -> bytes:
    return train_model(eos_id=-1)
