"""A small LLaMA shape, and the shapes of the published presets scaled down."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ngpt.config.schema import ModelConfig


@pytest.fixture(scope="session")
def small_config() -> Callable[..., ModelConfig]:
    """`small_config(**changes)`: a model that runs in milliseconds, with weights large enough for every part to matter."""

    def build(**changes: object) -> ModelConfig:
        shape = {
            "vocab_size": 101,
            "hidden_size": 32,
            "intermediate_size": 84,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_seq_len": 64,
            "initializer_range": 0.15,
        }
        return ModelConfig(**(shape | changes))  # type: ignore[arg-type]

    return build
