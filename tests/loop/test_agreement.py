"""What several ranks decide together in the loop: to stop after the same step, and what the held-out loss is."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from ngpt.data.batch import Batch
from ngpt.dist.collectives import Collectives
from ngpt.loop.evaluate import EvalResult, evaluate
from ngpt.loop.stop import stop_on_signals

CPU = torch.device("cpu")


def stop_on_rank_1() -> tuple[list[bool], int]:
    collectives = Collectives()
    with stop_on_signals() as stop:
        asked = [stop.agreed(collectives, CPU)]
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        asked.append(stop.agreed(collectives, CPU))
    return asked, stop.exit_code


def stop_during_the_agreement() -> list[bool]:
    collectives = Collectives()
    summed = collectives.max_

    def max_then_signal(tensor):
        total = summed(tensor).clone()
        if dist.get_rank() == 1 and not stop():
            os.kill(os.getpid(), signal.SIGUSR1)
        return total

    collectives.max_ = max_then_signal
    with stop_on_signals() as stop:
        return [stop.agreed(collectives, CPU) for _ in range(2)]


class ConstantLoss:
    """An engine whose loss is one nat a label."""

    device = CPU

    def evaluate(self, inputs):
        dist.barrier()  # as a forward pass that gathers weights: every rank must come as often as the others
        return (inputs["labels"] >= 0).sum() * (1.0 + dist.get_rank())


def evaluate_uneven_shares() -> EvalResult:
    """Rank 0 has labels 3 + 1, rank 1 has 2 and a batch that only fills up."""
    labels = [[[0, 1, 1]], [[1, -100, -100]]] if dist.get_rank() == 0 else [[[1, 1, -100]], [[-100, -100, -100]]]
    tensors = [torch.tensor(rows) for rows in labels]
    batches = [Batch(rows.clamp(min=0), rows, None, 0, 1, int((rows >= 0).sum()), lambda row: {}) for rows in tensors]
    return evaluate(ConstantLoss(), batches, torch.tensor([2, 5]), Collectives())


def test_a_signal_to_one_rank_stops_all_at_the_same_time_with_its_exit_code(on_ranks):
    """SIGUSR1 to one of two ranks | both stop after the same step, with its exit code"""
    assert on_ranks(2, stop_on_rank_1) == [([False, True], 75)] * 2


def test_a_signal_in_the_middle_of_the_agreement_counts_the_next_time(on_ranks):
    """A signal between two ranks' answers | counted the next time, by both"""
    assert on_ranks(2, stop_during_the_agreement) == [[False, True]] * 2


def test_the_held_out_loss_is_that_of_all_ranks_and_no_rank_leaves_out_a_batch(on_ranks):
    first, second = on_ranks(2, evaluate_uneven_shares)
    assert first == second
    assert first.tokens == 6
    assert first.loss == pytest.approx((4 * 1 + 2 * 2) / 6)
    assert first.loss_galore_protocol == pytest.approx((1 + 1 + 2) / (3 + 1))
    assert first.text_bytes == 2 + 5 * 5
