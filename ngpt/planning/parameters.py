"""The parameters of a run and what its optimizer will keep for each, from settings alone: names, shapes, groups; no tensors."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from ngpt.config.optimizers import LoRAConfig, LowRankConfig, OptimizerConfig
from ngpt.config.precision import ROUNDING
from ngpt.config.schema import RunConfig
from ngpt.engine.zero_cost import Layers
from ngpt.model.cost import matrix_shapes

KINDS = ("embedding", "attention", "feed-forward", "norms", "head", "adapters")
_OF_ALL = {field.name for field in dataclasses.fields(OptimizerConfig)}


class Parameter(NamedTuple):
    """A parameter as the optimizer will have it: `settings` of its group, or None where it is frozen."""

    name: str
    shape: tuple[int, ...]
    settings: dict[str, Any] | None

    @property
    def numel(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if ".lora_" in self.name:
            return "adapters"
        if ".self_attn." in self.name:
            return "attention"
        if ".mlp." in self.name:
            return "feed-forward"
        return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(self.name, "norms")


def parameters_of(config: RunConfig) -> list[Parameter]:
    """Every parameter, those of each layer together, from the embedding to the head; a tied head comes once, as the embedding."""
    optimizer, model = config.optimizer, config.model
    plain = {"state_dtype": optimizer.state_dtype, "rounding": ROUNDING[config.trainer.precision]}
    own = {field.name: getattr(optimizer, field.name) for field in dataclasses.fields(optimizer) if field.name not in _OF_ALL}
    low = plain | {name: value for name, value in own.items() if name != "embeddings"}
    matrices = matrix_shapes(model)
    found: list[Parameter] = []
    for matrix in matrices:
        shape = (matrix.rows, matrix.columns)
        if isinstance(optimizer, LoRAConfig) and matrix.projected:
            found.append(Parameter(matrix.name, shape, None))
            stem = matrix.name.removesuffix(".weight")
            found.append(Parameter(f"{stem}.lora_A", (optimizer.rank, matrix.columns), plain))
            found.append(Parameter(f"{stem}.lora_B", (matrix.rows, optimizer.rank), plain))
        else:
            found.append(Parameter(matrix.name, shape, low if _is_low_rank(optimizer, shape, projected=matrix.projected) else plain))
    for layer in range(model.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append(Parameter(f"model.layers.{layer}.{norm}.weight", (model.hidden_size,), plain))
    found.append(Parameter("model.norm.weight", (model.hidden_size,), plain))
    order = {name: number for number, name in enumerate(_layer_names(config))}
    return sorted(found, key=lambda parameter: order[layer_name(parameter.name)])


def layer_name(name: str) -> str:
    """`model.layers.3` for any parameter of that block; else the parameter's own name: the layers of `ngpt.engine.zero_sharding`."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else name


def layers_of(parameters: list[Parameter]) -> Layers:
    """Shape and settings of the trainable ones, by layers, in the order of backward."""
    layers: dict[str, list[tuple[tuple[int, ...], dict[str, Any]]]] = {}
    for parameter in parameters:
        if parameter.settings is not None:
            layers.setdefault(layer_name(parameter.name), []).append((parameter.shape, parameter.settings))
    return list(reversed(layers.values()))


def _layer_names(config: RunConfig) -> list[str]:
    blocks = [f"model.layers.{layer}" for layer in range(config.model.num_hidden_layers)]
    return ["model.embed_tokens.weight", *blocks, "model.norm.weight", "lm_head.weight"]


def _is_low_rank(optimizer: OptimizerConfig, shape: tuple[int, int], *, projected: bool) -> bool:
    """As `low_rank_groups` divides them: a matrix whose short side is not above the rank is left to AdamW."""
    return isinstance(optimizer, LowRankConfig) and min(shape) > optimizer.rank and (projected or optimizer.embeddings)
