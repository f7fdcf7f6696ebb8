"""THE TRAIN STEP: the micro-batches of one global batch in, one update, a StepResult out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ngpt.data.batch import Batch
from ngpt.engine.base import Engine


@dataclass(frozen=True)
class StepResult:
    """One update as the outside sees it.

    `loss` is the mean over all label tokens of the global batch, in nats; `tokens` counts label tokens since the start of the
    run and `step_tokens` those of this step; times are seconds; `batches` identifies the rows that were read.
    """

    step: int
    tokens: int
    step_tokens: int
    loss: float
    grad_norm: float
    lr: float
    applied: bool
    skipped_steps: int
    gradient_bytes: int
    step_seconds: float
    data_seconds: float
    batches: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class StepOutcome:
    """What `train_step` knows: a StepResult without the place of the step in the run."""

    loss: float
    step_tokens: int
    grad_norm: float
    lr: float
    applied: bool
    gradient_bytes: int


def train_step(engine: Engine, batches: Sequence[Batch], *, lr_multiplier: float) -> StepOutcome:
    """Run the micro-batches `batches` of one global batch and update once.

    The loss is the mean over all label tokens of the global batch, whatever its split: every micro-batch adds its *sum* of
    token losses divided by the tokens of the whole, so 8 x 1 equals 1 x 8 with padding and masks too.
    """
    step_tokens = sum(batch.num_label_tokens for batch in batches)
    loss_divisor = float(max(step_tokens, 1))  # a batch without a single label has loss 0, not 0/0
    loss_sum = torch.zeros((), dtype=torch.float32, device=engine.device)
    engine.begin_update(lr_multiplier=lr_multiplier, loss_divisor=loss_divisor, num_micro_batches=len(batches))
    for batch in batches:
        loss_sum += engine.accumulate(batch.model_inputs())
    loss = loss_sum / loss_divisor
    outcome = engine.finish_update(loss)
    return StepOutcome(loss.item(), step_tokens, outcome.grad_norm, outcome.lr, outcome.applied, outcome.gradient_bytes)
