"""A valid configuration to break, one rule at a time."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

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
