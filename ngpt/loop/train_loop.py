"""The training loop as a generator: yields one StepResult per update and knows nothing of logs, evaluation or disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from torch.profiler import record_function

from ngpt.data.batch import Batch
from ngpt.data.documents import DataError, DataUnavailable
from ngpt.engine.base import Engine
from ngpt.loop.spikes import SpikeRule
from ngpt.loop.train_step import StepResult, num_label_tokens, train_step

_FAILED = -(2**52)  # in place of a rank's number of tokens; below what all others can add up to


class TrainingDiverged(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is not finite, or spikes sent the run back too often."""


@dataclass
class Progress:
    """How far a run is: updates done, label tokens seen, updates skipped (in all, and for what is not finite in a row), seconds spent in
    steps, loss spikes, how often they sent the run back, and the losses that the next spike is told by.
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    loss_spikes: int = 0
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)

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
    texts_of_ranks: Callable[[str], list[str]] = lambda own: [own],
    spike_rule: SpikeRule | None = None,
    watch_every: int = 0,
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
        texts_of_ranks: what each rank has to say, by rank.
        spike_rule: tells loss spikes; None for no such thing.
        watch_every: steps between updates that have statistics of every parameter; 0 for none.

    Raises:
        TrainingDiverged: after the result of the last skipped update was yielded.
        DataError: some rank cannot read its next batches: on all ranks, after the same update.
    """
    if watch_every:
        engine.watch_refreshes()
    while progress.step < total_steps and not should_stop():
        started = time.perf_counter()
        with record_function("data"):
            step_batches, problem = _next_batches(batches, micro_batches_per_step)
        data_ready = time.perf_counter()
        step_tokens = sum_over_ranks(_FAILED if problem else num_label_tokens(step_batches))
        if step_tokens < 0:
            raise _of_all_ranks(problem, texts_of_ranks)
        limit = spike_rule.limit(progress.recent_losses) if spike_rule else math.inf
        dropped_above = limit if spike_rule and spike_rule.drop else math.inf
        update = train_step(
            engine,
            step_batches,
            label_tokens=step_tokens,
            lr_multiplier=lr_multiplier(progress.step),
            max_loss=dropped_above,
            watched=watch_every > 0 and (progress.step + 1) % watch_every == 0,
        )
        step_seconds = time.perf_counter() - started

        spike = limit < update.loss < math.inf
        complete = update.applied and not update.skipped_matrices
        progress.step += 1
        progress.tokens += step_tokens
        progress.seconds += step_seconds
        progress.skipped_steps += not complete
        if not (spike and update.loss > dropped_above):  # an update that a spike has cost says nothing about the row
            progress.skipped_in_a_row = 0 if complete else progress.skipped_in_a_row + 1
        progress.loss_spikes += spike
        if spike_rule:
            spike_rule.remember(progress.recent_losses, update.loss)
        yield StepResult(
            step=progress.step,
            tokens=progress.tokens,
            step_tokens=step_tokens,
            update=update,
            skipped_steps=progress.skipped_steps,
            step_seconds=step_seconds,
            data_seconds=data_ready - started,
            batches=step_batches,
            spike=spike,
            loss_spikes=progress.loss_spikes,
            rollbacks=progress.rollbacks,
        )
        if progress.skipped_in_a_row >= max_nonfinite_steps:
            raise TrainingDiverged(
                f"step {progress.step}: the loss or the gradient was not finite {progress.skipped_in_a_row} times in a row "
                f"(trainer.max_nonfinite_steps = {max_nonfinite_steps}); lower optimizer.lr, lengthen scheduler.warmup_steps or set "
                f"trainer.grad_clip, and look at the batches in nonfinite_steps.jsonl of the run folder"
            )


def _next_batches(batches: Iterator[Batch], count: int) -> tuple[list[Batch], DataError | None]:
    """The micro-batches of an update, or why there are none: the other ranks have to be told before this one may raise."""
    try:
        return list(islice(batches, count)), None
    except DataError as error:
        return [], error


def _of_all_ranks(problem: DataError | None, texts_of_ranks: Callable[[str], list[str]]) -> DataError:
    """The error to raise on every rank where the data of some of them failed."""
    texts = texts_of_ranks(str(problem) if problem else "")
    if len(texts) == 1 and problem:
        return problem
    lasting = texts_of_ranks("" if problem is None or isinstance(problem, DataUnavailable) else "lasting")
    kind = DataError if any(lasting) else DataUnavailable
    return kind("\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text))
