"""The Engine protocol: all that the loop, the checkpoints and the telemetry know of how a model is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ngpt.optim.state import StatePart


@dataclass(frozen=True)
class UpdateOutcome:
    """What became of one optimizer update.

    `loss` is the mean loss of the global batch. `grad_norm` is the global L2 norm of the gradient before clipping and
    `applied_grad_norm` that of what the update is made from, which clipping limits: under per-layer updates, projected matrices
    count there in their subspace (docs/math.md). `lr` is the rate of the first parameter group. `applied` is False where the loss
    or the gradient was not finite, or the loss too high, and nothing was changed; `skipped_matrices` counts those left out of an
    immediate update.
    `gradient_bytes` are the gradients and accumulators that were alive before the update. `statistics` of each parameter by its name,
    where the update was watched (`ngpt.optim.watch` says what they are).
    """

    loss: float
    grad_norm: float
    applied_grad_norm: float
    lr: float
    applied: bool
    skipped_matrices: int
    gradient_bytes: int
    statistics: Mapping[str, Mapping[str, float]] | None = None


class Engine(Protocol):
    """Holds the model and the optimizer of one rank."""

    device: torch.device
    model: nn.Module  # with all its weights on every rank, except at stage 3 of ZeRO

    def watch_refreshes(self) -> None:
        """From here on remember how far each refresh turned its basis, for the statistics of later updates."""
        ...

    def begin_update(self, *, lr_multiplier: float, loss_divisor: float, num_micro_batches: int, watched: bool = False) -> None:
        """Start one optimizer update.

        Args:
            lr_multiplier: factor on every group's peak learning rate.
            loss_divisor: number of label tokens of the whole global batch, so that gradients add up to those of the mean loss.
            num_micro_batches: how often `accumulate` will be called before `finish_update`.
            watched: its outcome is to have statistics, which takes time and a copy of one weight (of one layer, on several ranks).
        """
        ...

    def accumulate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Forward and backward of the next micro-batch.

        Args:
            inputs: keyword arguments of the model, on any device; the model returns the sum of token losses.

        Returns:
            The sum of token losses, a detached fp32 scalar on the device.
        """
        ...

    def finish_update(self, loss: Tensor, *, max_loss: float = math.inf) -> UpdateOutcome:
        """Clip and apply the accumulated gradient, or drop it where it or `loss` (a scalar) is not finite, or the loss above `max_loss`.

        Updates that take place inside backward cannot be dropped for `max_loss`.
        """
        ...

    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Sum of token losses of one batch without gradients, an fp32 scalar on the device."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """Exact bytes of `weights` and of the optimizer state by kind (`optimizer_state` is their total)."""
        ...

    def weight_layout(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Dtypes and whole shapes of what `weights` gives, without communication."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by their Hugging Face names, tied ones once, one at a time.

        All ranks must iterate to the end together. Where gathering a weight costs communication, only rank 0 gets it; the others get an
        empty tensor.
        """
        ...

    def load_weights(
        self, read: Callable[[str], Tensor], names: Sequence[str], *, may_miss: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Fill the parameters, of which `read` gives one whole tensor at a time. Those that `may_miss` in `names` stay as they are.

        Raises ValueError naming what is missing in `names`, unknown or of another shape; some weights may have been filled by then.
        """
        ...

    def optimizer_parts(self) -> Mapping[str, StatePart]:
        """The optimizer's state on this rank by "parameter/state": live tensors, which saving reads and loading fills."""
        ...

    def communication(self) -> dict[str, int]:
        """Bytes that this rank sent to others since the last call, by what they were for; empty without other ranks."""
        ...

    def close(self) -> None:
        """Remove all hooks; the engine cannot be used afterwards."""
        ...
