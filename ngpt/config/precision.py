"""What `trainer.precision` means: how wide weights are, and how new ones are rounded."""

from __future__ import annotations

ROUNDING = {"fp32": "nearest", "bf16": "stochastic", "bf16_nearest": "nearest", "bf16_master": "master"}  # the optimizers' `rounding`
