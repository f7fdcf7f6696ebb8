"""THE TRAIN STEP: the micro-batches of one global batch in, one update, a StepResult out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import record_function  # names in a profile; a few microseconds a step where there is none

from ngpt.data.batch import Batch
from ngpt.engine.base import Engine, UpdateOutcome


@dataclass(frozen=True)
class StepResult:
    """One update as the outside sees it.

    `tokens` counts label tokens since the start of the run and `step_tokens` those of this step, on all ranks; `skipped_steps` the updates
    so far that were left out, wholly or in part, because loss or gradient was not finite or a spike; times are seconds; `batches` are this
    rank's. `spike` says that the loss was far above those before it, `loss_spikes` how many were, and `rollbacks` how often one has sent
    the run back to a checkpoint.
    """

    step: int
    tokens: int
    step_tokens: int
    update: UpdateOutcome
    skipped_steps: int
    step_seconds: float
    data_seconds: float
    batches: Sequence[Batch]
    spike: bool = False
    loss_spikes: int = 0
    rollbacks: int = 0


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    *,
    label_tokens: int,
    lr_multiplier: float,
    max_loss: float = math.inf,
    watched: bool = False,
) -> UpdateOutcome:
    """Run this rank's micro-batches `batches` of one global batch, which holds `label_tokens` on all ranks, and update once.

    The loss is the mean over all label tokens of the global batch, whatever its split: every micro-batch adds its *sum* of
    token losses divided by the tokens of the whole, so 8 x 1 equals 1 x 8 with padding and masks too. Losses and gradients are
    summed over ranks, never averaged. The update is dropped where the loss is above `max_loss`. `watched`: its outcome has
    statistics of every parameter.
    """
    loss_divisor = float(max(label_tokens, 1))  # a batch without a single label has loss 0, not 0/0
    loss_sum = torch.zeros((), dtype=torch.float32, device=engine.device)
    engine.begin_update(lr_multiplier=lr_multiplier, loss_divisor=loss_divisor, num_micro_batches=len(batches), watched=watched)
    for batch in batches:
        with record_function("forward+backward"):
            loss_sum += engine.accumulate(batch.model_inputs())
    with record_function("update"):
        return engine.finish_update(loss_sum / loss_divisor, max_loss=max_loss)


def num_label_tokens(batches: Sequence[Batch]) -> int:
    """Tokens that are predicted in `batches`."""
    return sum(batch.num_label_tokens for batch in batches)
