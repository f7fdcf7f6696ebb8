"""The shapes of conf/model for the commands of bench/, without Hydra."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from ngpt.config.schema import ModelConfig
from ngpt.model.cost import matrix_shapes

MODELS = Path(__file__).resolve().parent.parent / "conf" / "model"


def model_of(size: str) -> ModelConfig:
    """The shape in conf/model/llama_SIZE.yaml."""
    preset = yaml.safe_load((MODELS / f"llama_{size}.yaml").read_text(encoding="utf-8"))
    return ModelConfig(**{key: value for key, value in preset.items() if key != "defaults"})


def block_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of the seven matrices of a block that low-rank methods project."""
    one_block = dataclasses.replace(model, num_hidden_layers=1)
    return [(matrix.rows, matrix.columns) for matrix in matrix_shapes(one_block) if matrix.projected]
