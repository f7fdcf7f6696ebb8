"""What every engine does around an update: rates, one read of its scalars, clipping or skipping; and loading weights that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ngpt.engine.base import UpdateOutcome
from ngpt.optim import AdamW, state_bytes
from ngpt.optim.state import StatePart
from ngpt.optim.watch import Watch


class Gradients(Protocol):
    """The gradients of an update, however they are kept until it is applied."""

    immediate: bool  # updates take place inside backward

    def begin_update(self, num_micro_batches: int) -> None: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        ...

    def live_bytes(self) -> int:
        """Bytes of all gradients and accumulators that are alive."""
        ...

    def scalars(self, loss: Tensor) -> Tensor:
        """(4,) fp32 on the device, of all processes together: loss, norm of the full gradient, norm of what will be applied, matrices left
        out."""
        ...

    def scale_(self, factor: float) -> None: ...

    def step(self) -> None: ...

    def discard(self) -> None: ...

    def close(self) -> None:
        """Let go of the parameters."""
        ...


class UpdateCycle:
    """The part of the Engine protocol that does not depend on where weights and gradients are.

    Args:
        model: weights on their device, in their dtype.
        optimizer: over the trainable ones.
        forward: the model, or what runs it.
        grad_clip: largest global gradient norm; 0 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        gradients: Gradients,
        *,
        forward: Callable[..., Any],
        device: torch.device,
        grad_clip: float,
    ) -> None:
        self.device = device
        self.model = model
        self.optimizer = optimizer
        self._gradients = gradients
        self._forward = forward
        self._grad_clip = grad_clip
        self._peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self._loss_divisor = 1.0

    # ------------------------------------------------------------------------------------------------------------ update
    def watch_refreshes(self) -> None:
        self.optimizer.watch = self.optimizer.watch or Watch()

    def begin_update(self, *, lr_multiplier: float, loss_divisor: float, num_micro_batches: int, watched: bool = False) -> None:
        self._loss_divisor = loss_divisor
        if watched:
            self.watch_refreshes()
            assert self.optimizer.watch
            self.optimizer.watch.begin()
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * lr_multiplier
        self._gradients.begin_update(num_micro_batches)

    def accumulate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.model.train()
        loss_sum = self._forward(**self._on_device(inputs))
        self._gradients.backward(loss_sum / self._loss_divisor)
        return loss_sum.detach()

    def finish_update(self, loss: Tensor, *, max_loss: float = math.inf) -> UpdateOutcome:
        gradient_bytes = self._gradients.live_bytes()
        loss_value, norm, applied_norm, skipped = self._gradients.scalars(loss).tolist()  # the one synchronisation of a step
        # Where the update took place in backward, matrices with a gradient that is not finite were left out there, one by one.
        immediate = self._gradients.immediate
        applied = math.isfinite(loss_value) and (immediate or (loss_value <= max_loss and math.isfinite(applied_norm)))
        if not applied:
            self._gradients.discard()
        else:
            if 0 < self._grad_clip < applied_norm:
                self._scale_gradients(self._grad_clip / applied_norm)
            self._gradients.step()
        watch = self.optimizer.watch
        statistics = self._end_watch(watch) if watch and watch.active else None
        lr = self.optimizer.param_groups[0]["lr"]
        return UpdateOutcome(loss_value, norm, applied_norm, lr, applied, int(skipped), gradient_bytes, statistics)

    def _scale_gradients(self, factor: float) -> None:
        self._gradients.scale_(factor)
        if self.optimizer.watch:
            self.optimizer.watch.scaled(factor)

    def _end_watch(self, watch: Watch) -> dict[str, dict[str, float]]:
        return watch.end()

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.model.eval()
        return self._forward(**self._on_device(inputs))

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}

    # ------------------------------------------------------------------------------------------------- weights and state
    def state_bytes(self) -> dict[str, int]:
        kinds = state_bytes(self.optimizer)
        weights = sum(self._weight_bytes(parameter) for parameter in self.model.parameters())
        return {"weights": weights, "optimizer_state": kinds.pop("total")} | kinds

    def optimizer_parts(self) -> dict[str, StatePart]:
        return self.optimizer.state_parts()

    def communication(self) -> dict[str, int]:
        return {}

    def weight_layout(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (parameter.dtype, self._shape(parameter)) for name, parameter in self.model.named_parameters()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    @torch.no_grad()
    def load_weights(
        self, read: Callable[[str], Tensor], names: Sequence[str], *, may_miss: Callable[[str], bool] = lambda name: False
    ) -> None:
        own = dict(self.model.named_parameters())
        problems = [f"missing: {name}" for name in own if name not in names and not may_miss(name)]
        problems += [f"unknown: {name}" for name in names if name not in own]
        for name, parameter in own.items():
            if name not in names:
                continue
            whole = read(name)
            if whole.shape != self._shape(parameter):
                problems.append(f"{name}: {tuple(whole.shape)} in the file, {tuple(self._shape(parameter))} in the model")
            elif not problems:
                self._write_weight(parameter, whole)
        if problems:
            raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems))

    def _shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def _write_weight(self, parameter: Tensor, whole: Tensor) -> None:
        parameter.copy_(whole)

    def _weight_bytes(self, parameter: Tensor) -> int:
        return parameter.nbytes

    def close(self) -> None:
        self._gradients.close()
