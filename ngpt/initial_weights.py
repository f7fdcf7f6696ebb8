"""Weights to begin with (`model.init_from`): those of a LLaMA folder in Hugging Face's layout, in the place of random ones."""

from __future__ import annotations

from pathlib import Path

import torch

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.config.schema import ModelConfig
from ngpt.engine.base import Engine
from ngpt.model import lora
from ngpt.trained import open_weights


def begin_with(engine: Engine, folder: Path, config: ModelConfig) -> None:
    """Fill the weights of a new engine, and the fp32 copies of them that its optimizer keeps, which lose nothing by the weights' dtype.

    Adapters stay as they were drawn. Every rank reads the files.

    Raises:
        CheckpointError: the files are missing or broken, or do not fit; some weights may have been filled by then.
    """
    weights = open_weights(folder, config)
    try:
        engine.load_weights(weights.read, weights.names, may_miss=lora.is_adapter)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"model.init_from = {folder}: {error}") from error
    with torch.no_grad():
        for name, part in engine.optimizer_parts().items():
            parameter, _, kind = name.rpartition("/")
            if kind == "master" and not lora.is_adapter(parameter):
                whole = weights.read(parameter).reshape(part.shape)
                part.values.copy_(whole[..., part.start : part.start + part.count])
