"""The training loop as a generator: yields one StepResult per update and knows nothing of logs, evaluation or disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from ngpt.data.batch import Batch
from ngpt.engine.base import Engine
from ngpt.loop.train_step import StepResult, num_label_tokens, train_step


class TrainingDiverged(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is not finite."""


@dataclass
class Progress:
    """How far a run is: updates done, label tokens seen, updates skipped (in all, and in a row), seconds spent in steps."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def train_loop(
    engine: Engine,
    batches: Iterator[Batch],
    progress: Progress,
    *,
    total_steps: int,
    micro_batches_per_step: int,
    lr_multiplier: Callable[[int], float],
    max_nonfinite_steps: int,
    should_stop: Callable[[], bool],
    sum_over_ranks: Callable[[int], int] = lambda own: own,
) -> Iterator[StepResult]:
    """Train from `progress.step` to `total_steps`, yielding after every update.

    Args:
        engine: holds model and optimizer.
        batches: micro-batches in order, endless; `micro_batches_per_step` of them make one update.
        progress: updated in place before each yield, so that at a yield it and the batches' own state describe the same moment.
        lr_multiplier: factor on the learning rate for the update with this index, counted from 0.
        max_nonfinite_steps: skipped updates in a row after which the run stops.
        should_stop: asked before every update; True ends the loop. Must give all ranks the same answer.
        sum_over_ranks: adds up a count of this rank with those of the others.

    Raises:
        TrainingDiverged: after the result of the last skipped update was yielded.
    """
    while progress.step < total_steps and not should_stop():
        started = time.perf_counter()
        step_batches = list(islice(batches, micro_batches_per_step))
        data_ready = time.perf_counter()
        step_tokens = sum_over_ranks(num_label_tokens(step_batches))
        update = train_step(engine, step_batches, label_tokens=step_tokens, lr_multiplier=lr_multiplier(progress.step))
        step_seconds = time.perf_counter() - started

        complete = update.applied and not update.skipped_matrices
        progress.step += 1
        progress.tokens += step_tokens
        progress.seconds += step_seconds
        progress.skipped_steps += not complete
        progress.skipped_in_a_row = 0 if complete else progress.skipped_in_a_row + 1
        yield StepResult(
            step=progress.step,
            tokens=progress.tokens,
            step_tokens=step_tokens,
            update=update,
            skipped_steps=progress.skipped_steps,
            step_seconds=step_seconds,
            data_seconds=data_ready - started,
            batches=step_batches,
        )
        if progress.skipped_in_a_row >= max_nonfinite_steps:
            raise TrainingDiverged(
                f"step {progress.step}: the loss or the gradient was not finite {progress.skipped_in_a_row} times in a row "
                f"(trainer.max_nonfinite_steps = {max_nonfinite_steps}); lower optimizer.lr, lengthen scheduler.warmup_steps or set "
                f"trainer.grad_clip, and look at the batches in nonfinite_steps.jsonl of the run folder"
            )
