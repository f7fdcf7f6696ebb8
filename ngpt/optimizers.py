"""From settings to optimizer and schedule: the one place where the configuration meets `ngpt.optim`, which knows no configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from ngpt.config.schema import (
    AdamWConfig,
    ConstantSchedulerConfig,
    CosineSchedulerConfig,
    GaLoreConfig,
    LinearSchedulerConfig,
    NaturalGaLoreConfig,
    OptimizerConfig,
    SchedulerConfig,
    WSDSchedulerConfig,
    warmup_steps_in_run,
)
from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups, lr_schedule

_ROUNDING = {"fp32": "nearest", "bf16": "stochastic", "bf16_nearest": "nearest", "bf16_master": "master"}


def build_optimizer(model: nn.Module, *, config: OptimizerConfig, precision: str, seed: int) -> AdamW:
    """The optimizer that `config` asks for, over all parameters of `model`.

    Args:
        precision: `trainer.precision`; says how bf16 weights are rounded.
        seed: of random bases and of stochastic rounding.
    """
    shared = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "rounding": _ROUNDING[precision],
        "seed": seed,
    }
    if isinstance(config, AdamWConfig):
        return AdamW(model.named_parameters(), **shared)
    assert isinstance(config, GaLoreConfig)
    groups = low_rank_groups(model, rank=config.rank, update_proj_gap=config.update_proj_gap, scale=config.scale)
    shared |= {"subspace": config.subspace, "on_refresh": config.on_refresh, "stagger": config.stagger}
    if isinstance(config, NaturalGaLoreConfig):
        return NaturalGaLore(groups, **shared, fisher=config.fisher, history=config.history, damping=config.damping)
    return GaLore(groups, **shared)


def build_schedule(config: SchedulerConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate for update number `step`, counted from 0."""
    warmup = warmup_steps_in_run(config, total_steps)
    match config:
        case CosineSchedulerConfig():
            return functools.partial(lr_schedule.cosine, total_steps=total_steps, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio)
        case LinearSchedulerConfig():
            return functools.partial(lr_schedule.linear, total_steps=total_steps, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio)
        case WSDSchedulerConfig():
            return functools.partial(
                lr_schedule.wsd,
                total_steps=total_steps,
                warmup_steps=warmup,
                decay_fraction=config.decay_fraction,
                min_lr_ratio=config.min_lr_ratio,
            )
        case ConstantSchedulerConfig():
            return functools.partial(lr_schedule.constant, warmup_steps=warmup)
    raise TypeError(f"no schedule for {type(config).__name__}")
