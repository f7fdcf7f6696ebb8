"""From settings to optimizer and schedule: the one place where the configuration meets `ngpt.optim`, which knows no configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
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
)
from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups
from ngpt.optim import lr_schedule
