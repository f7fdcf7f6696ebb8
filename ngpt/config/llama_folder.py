"""config.json of a Hugging Face LLaMA folder: read as the shape of a model, and written from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ngpt.config.schema import ModelConfig

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What both call by the same name, and what must agree for weights to mean the same. Norms and angles have no weights, and count too.
_SAME_NAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
SHAPE = (*_SAME_NAME, "num_key_value_heads", "rope_theta", "rms_norm_eps")
# Settings of LLaMA-like models that our model does not have, with the values that leave them out.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
}


class NotLlama(ValueError):
    """A folder does not describe a LLaMA that this project can run; the text says which file, and all that is in the way."""


def read_llama_config(folder: Path) -> ModelConfig:
    """The shape that the folder's config.json gives. `name` is the folder's, `max_seq_len` its max_position_embeddings.

    Raises:
        NotLlama: the file is missing or broken, or describes a model with parts that ours does not have.
    """
    path = folder / CONFIG
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotLlama(f"{path} is missing: give a folder in Hugging Face's layout, with {CONFIG} and {SINGLE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise NotLlama(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise NotLlama(f"{path} does not hold a JSON object")
    problems = list(_strange_parts(tree))
    try:
        config = _model_config(tree, name=folder.resolve().name)
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{error.args[0]} is missing" if isinstance(error, KeyError) else f"a value is of the wrong type ({error})")
    if problems:
        raise NotLlama(f"{path}: not a LLaMA that can be run here:\n  " + "\n  ".join(problems))
    return config


def differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The fields of `SHAPE` in which two models differ, with both values."""
    pairs = {name: (shape_value(ours, name), shape_value(theirs, name)) for name in SHAPE}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def shape_value(config: ModelConfig, name: str) -> Any:
    """A field of the shape; key/value heads as a number even where they are as many as query heads."""
    value = getattr(config, name)
    return config.num_attention_heads if name == "num_key_value_heads" and value is None else value


def llama_config(config: ModelConfig, *, dtype: str, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The content of config.json.

    Args:
        dtype: of the weights beside it, as torch calls it: `float32`, `bfloat16`.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: shape_value(config, name) for name in SHAPE},
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_scaling": None,
        "use_cache": True,
        "torch_dtype": dtype,
        **token_ids,
    }


def _model_config(tree: Mapping[str, Any], *, name: str) -> ModelConfig:
    kinds = {field.name: type(field.default) for field in dataclasses.fields(ModelConfig)}
    # As old folders leave them out, these have the defaults of transformers.
    defaults = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "max_position_embeddings": 2048}
    values = defaults | {key: value for key, value in tree.items() if value is not None}
    read = {key: kinds[key](values[key]) for key in (*_SAME_NAME, "rms_norm_eps", "initializer_range")}
    heads = int(values.get("num_key_value_heads", read["num_attention_heads"]))
    rotary = tree.get("rope_parameters") or {}
    return ModelConfig(
        **read,
        name=name,
        num_key_value_heads=None if heads == read["num_attention_heads"] else heads,
        max_seq_len=int(values["max_position_embeddings"]),
        rope_theta=float(rotary.get("rope_theta", values.get("rope_theta", 10000.0))),
    )


def _strange_parts(tree: Mapping[str, Any]) -> Iterator[str]:
    """Parts of a model that ours does not have."""
    for key, accepted in _WITHOUT.items():
        if tree.get(key) not in accepted:
            yield f"{key} is {tree.get(key)!r}, must be {accepted[0]!r}"
    for key in ("rope_scaling", "rope_parameters"):
        scaling = tree.get(key)
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
        if kind not in (None, "default"):
            yield f"{key} asks for positions of type {kind!r}, there are plain rotary ones only"
    hidden, heads, width = (tree.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if width is not None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and width * heads != hidden:
        yield f"head_dim is {width}, must be hidden_size / num_attention_heads = {hidden / heads:g}"
