"""A scripted engine and batches without data, so that the loop is tested alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ngpt.engine.base import UpdateOutcome


class FakeBatch:
    """A batch whose loss sum is written on it."""

    def __init__(self, index: int, tokens: int, loss_sum: float) -> None:
        self.index = index
        self.num_label_tokens = tokens
        self.loss_sum = loss_sum
        self.labels = torch.full((1, max(tokens, 1)), 0 if tokens else -100)

    def model_inputs(self) -> dict[str, Tensor]:
        return {"loss_sum": torch.tensor(self.loss_sum)}

    def identity(self) -> dict[str, int]:
        return {"first_row": self.index}


class FakeEngine:
    """Returns the loss sums that the batches carry; records what it was asked."""

    device = torch.device("cpu")
    skipped_matrices = 0

    def __init__(self) -> None:
        self.updates: list[SimpleNamespace] = []

    def watch_refreshes(self) -> None: ...

    def begin_update(self, *, lr_multiplier: float, loss_divisor: float, num_micro_batches: int, watched: bool = False) -> None:
        self.updates.append(
            SimpleNamespace(lr_multiplier=lr_multiplier, loss_divisor=loss_divisor, num_micro_batches=num_micro_batches, seen=0)
        )

    def accumulate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.updates[-1].seen += 1
        return inputs["loss_sum"]

    def finish_update(self, loss: Tensor, *, max_loss: float = math.inf) -> UpdateOutcome:
        self.updates[-1].loss = loss.item()
        applied = bool(torch.isfinite(loss)) and loss.item() <= max_loss
        return UpdateOutcome(loss.item(), 1.0, 1.0, lr=0.1, applied=applied, skipped_matrices=self.skipped_matrices, gradient_bytes=12)

    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["loss_sum"]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_batch() -> type[FakeBatch]:
    return FakeBatch
