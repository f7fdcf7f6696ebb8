"""The engine for one device: no DeepSpeed, no collectives; the reference that every other engine must equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ngpt.engine.base import UpdateOutcome
from ngpt.optim import AdamW, state_bytes
from ngpt.optim.per_layer_hook import attach


def weight_dtype(precision: str) -> torch.dtype:
    """Dtype of weights and activations under `trainer.precision`."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


class LocalEngine:
    """One model, one optimizer, one device.

    Args:
        build_model: makes the model, in fp32 on the CPU, so that its initial weights depend on the seed alone.
        build_optimizer: makes the optimizer of the model's parameters once they have their final device and dtype.
        apply: `whole`, `deferred` or `immediate`, as `optimizer.apply`.
        grad_clip: largest global gradient norm; 0 for none.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        build_optimizer: Callable[[nn.Module], AdamW],
        *,
        device: torch.device,
        dtype: torch.dtype,
        apply: str,
        grad_clip: float,
    ) -> None:
        self.device = device
        self.model = build_model().to(device=device, dtype=dtype)
        self.optimizer = build_optimizer(self.model)
        self._peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._grad_clip = grad_clip
        self._loss_divisor = 1.0
        self._gradients = _WholeGradients(self.optimizer) if apply == "whole" else _PerLayerGradients(self.optimizer, apply)

    def begin_update(self, *, lr_multiplier: float, loss_divisor: float, num_micro_batches: int) -> None:
        self.model.train()
        self._loss_divisor = loss_divisor
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * lr_multiplier
        self._gradients.begin_update(num_micro_batches)

    def accumulate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        loss_sum = self.model(**self._on_device(inputs))
        self._gradients.backward(loss_sum / self._loss_divisor)
        return loss_sum.detach()

    def finish_update(self, loss: Tensor) -> UpdateOutcome:
        gradient_bytes = self._gradients.live_bytes()
        scalars = torch.stack([scalar.float() for scalar in (loss, *self._gradients.scalars())])
        loss_value, norm, applied_norm, skipped = scalars.tolist()  # the one synchronisation of a step
        # Where the update took place in backward, matrices with a gradient that is not finite were left out there, one by one.
        applied = math.isfinite(loss_value) and (self._gradients.immediate or math.isfinite(applied_norm))
        if not applied:
            self._gradients.discard()
        else:
            if 0 < self._grad_clip < applied_norm:
                self._gradients.scale_(self._grad_clip / applied_norm)
            self._gradients.step()
        lr = self.optimizer.param_groups[0]["lr"]
        return UpdateOutcome(loss_value, norm, applied_norm, lr, applied, int(skipped), gradient_bytes)

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.model.eval()
        return self.model(**self._on_device(inputs))

    def state_bytes(self) -> dict[str, int]:
        kinds = state_bytes(self.optimizer)
        return {"weights": sum(p.nbytes for p in self.model.parameters()), "optimizer_state": kinds.pop("total")} | kinds

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self.weights()
        problems = [f"missing: {name}" for name in own if name not in weights]
        problems += [f"unknown: {name}" for name in weights if name not in own]
        problems += [
            f"{name}: {tuple(weights[name].shape)} in the file, {tuple(parameter.shape)} in the model"
            for name, parameter in own.items()
            if name in weights and weights[name].shape != parameter.shape
        ]
        if problems:
            raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems))
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(state))
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # torch would bring back the old run's rates and decays; the configuration decides

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}


class _WholeGradients:
    """Plain backward: every gradient stays in `.grad` until the update."""

    immediate = False

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = optimizer

    def begin_update(self, num_micro_batches: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _grads(self) -> list[Tensor]:
        return [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    def live_bytes(self) -> int:
        return sum(grad.nbytes for grad in self._grads())

    def scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        """Norm of the full gradient, norm of what will be applied, matrices left out: on the device, so that all are read at once."""
        norms = torch._foreach_norm(self._grads(), 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        return norm, norm, torch.zeros_like(norm)

    def scale_(self, factor: float) -> None:
        torch._foreach_mul_(self._grads(), factor)  # pyright: ignore[reportPrivateImportUsage]

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


class _PerLayerGradients:
    """Per-layer updates (`ngpt.optim.per_layer_hook`) behind the same calls."""

    def __init__(self, optimizer: AdamW, apply: str) -> None:
        self._updates = attach(optimizer, apply=apply)
        self.immediate = self._updates.immediate

    def begin_update(self, num_micro_batches: int) -> None:
        self._updates.begin_update(num_micro_batches)

    def backward(self, loss: Tensor) -> None:
        self._updates.begin_micro_batch()
        # An immediate update cannot be taken back, so a loss that is not finite must not reach backward at all.
        if not self.immediate or bool(torch.isfinite(loss)):
            loss.backward()

    def live_bytes(self) -> int:
        return self._updates.live_bytes()

    def scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        """As above; with several micro-batches the full gradient never exists, and the norm of what was accumulated stands for its own."""
        applied, full = self._updates.norm(), self._updates.full_norm()
        return (applied if full is None else full), applied, self._updates.skipped_in_update()

    def scale_(self, factor: float) -> None:
        self._updates.scale_(factor)

    def step(self) -> None:
        self._updates.step()

    def discard(self) -> None:
        self._updates.discard()
