"""The formulas of docs/math.md for the state are what real optimizers allocate, at any size (on the meta device: nothing is)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from ngpt.config.compose import compose_run
from ngpt.config.schema import ModelConfig
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import AdamW, AdaRankGrad, GaLore, NaturalGaLore, low_rank_groups, state_bytes
from ngpt.optim.state import KIND
from ngpt.optim.state_cost import expected_state_bytes, expected_total

RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}


def of_full_rank(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "rank": "full"} if "rank" in group else group for group in groups]


METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "galore": GaLore,
    "galore of full rank": lambda groups, **options: GaLore(of_full_rank(groups), **options),
    "two-sided galore": lambda groups, **options: GaLore(groups, proj_type="full", **options),
    "galore with adafactor": lambda groups, **options: GaLore(groups, moments="adafactor", **options),
    "two-sided galore with adafactor": lambda groups, **options: GaLore(groups, moments="adafactor", proj_type="full", **options),
    "galore with momentum": lambda groups, **options: GaLore(groups, moments="momentum", **options),
    "fira": lambda groups, **options: GaLore(groups, complement="fira", **options),
    "no fisher": lambda groups, **options: NaturalGaLore(groups, fisher="none", **options),
    "history": lambda groups, **options: NaturalGaLore(groups, fisher="history", history=20, **options),
    "short history with complement": lambda groups, **options: NaturalGaLore(
        groups, fisher="history", history=3, complement="fira", **options
    ),
    "two-sided history": lambda groups, **options: NaturalGaLore(groups, fisher="two_sided", history=20, **options),
    "factored": lambda groups, **options: NaturalGaLore(groups, fisher="factored", **options),
    "diagonal": lambda groups, **options: NaturalGaLore(groups, fisher="diagonal", **options),
    "diagonal without complement": lambda groups, **options: NaturalGaLore(groups, fisher="diagonal", complement="none", **options),
    "adarankgrad": lambda groups, **options: AdaRankGrad(groups, min_rank=8, **options),
}
methods = pytest.mark.parametrize("method", ["adamw", *METHODS])
state_dtypes = pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "8bit"])
precisions = pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "master")]
)


@cache
def shape_of(size: str) -> ModelConfig:
    return compose_run([f"model=llama_{size}", "trainer.max_steps=1"], check_files=False).model


@cache
def llama(size: str, dtype: torch.dtype, num_layers: int | None = None) -> LlamaForCausalLM:
    """A model without memory: of all its layers, or of one, which has all the shapes and takes a fraction of the time."""
    config = shape_of(size)
    with torch.device("meta"):
        return LlamaForCausalLM(dataclasses.replace(config, num_hidden_layers=num_layers or config.num_hidden_layers)).to(dtype)


def build(method: str, model: nn.Module, rank: int, **options: Any) -> torch.optim.Optimizer:
    if method == "adamw":
        return AdamW(model.named_parameters(), **options)
    return METHODS[method](low_rank_groups(model, rank=rank), **options)


def walk(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the storages behind all state, by kind: whatever a view or a shared storage might hide is in it."""
    sizes: Counter[str] = Counter(basis=0, moments=0, fisher=0, master=0, other=0)
    for state in optimizer.state.values():
        for key, tensor in state.items():
            sizes[KIND.get(key, "other")] += tensor.untyped_storage().nbytes()
    return {**sizes, "total": sum(sizes.values())}


def formula(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> dict[str, int]:
    return expected_total([(p.shape, group) for group in optimizer.param_groups for p in group["params"]], dtype)


@methods
def test_formula_and_walk_agree_for_every_model(method: str) -> None:
    for size, rank in RANKS.items():
        optimizer = build(method, llama(size, torch.bfloat16), rank, state_dtype="bf16")
        assert formula(optimizer, torch.bfloat16) == walk(optimizer) == state_bytes(optimizer), size


@methods
@state_dtypes
@precisions
def test_formula_and_walk_agree_for_every_precision(method: str, state_dtype: str, dtype: torch.dtype, rounding: str) -> None:
    for size, rank in RANKS.items():
        optimizer = build(method, llama(size, dtype, 1), rank, state_dtype=state_dtype, rounding=rounding)
        assert formula(optimizer, dtype) == walk(optimizer) == state_bytes(optimizer), size


@methods
@state_dtypes
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_formula_and_walk_agree_for_small_odd_shapes_and_other_dtypes(method: str, state_dtype: str, dtype: torch.dtype) -> None:
    for shape in ((12, 9), (9, 257), (10, 10)):  # a part of a block of 256, a block and a part, square
        matrix = nn.Parameter(torch.zeros(shape, dtype=dtype))
        options = {"state_dtype": state_dtype, "rounding": "master"}
        groups = [{"params": [matrix], "rank": 8}]
        optimizer = AdamW([matrix], **options) if method == "adamw" else METHODS[method](groups, **options)
        assert expected_state_bytes(shape, optimizer.param_groups[0], dtype) == walk(optimizer) == state_bytes(optimizer)


@state_dtypes
@pytest.mark.parametrize("shape", [(), (1,), (257,), (3, 4, 5)])
def test_formula_and_walk_agree_for_parameters_that_are_no_matrices(shape: tuple[int, ...], state_dtype: str) -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(shape))], state_dtype=state_dtype)
    assert expected_state_bytes(shape, {"state_dtype": state_dtype}, torch.float32) == walk(optimizer)


def test_missing_settings_are_those_of_galore() -> None:
    assert expected_state_bytes((60, 40), {"rank": 5}, torch.bfloat16) == {
        "basis": 2 * 40 * 5,
        "moments": 4 * 2 * 5 * 60,
        "fisher": 0,
        "master": 0,
        "other": 3 * 8,
        "total": 400 + 2400 + 24,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fisher": "diagonal", "moments": "adam"}, "fisher = 'diagonal' needs moments=\"momentum\""),
        ({"proj_type": "full", "complement": "fira"}, "proj_type = 'full' needs complement"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_state_bytes((60, 40), {"rank": 5, **settings}, torch.bfloat16)
