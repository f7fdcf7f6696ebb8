"""The engine for one device: no DeepSpeed, no collectives; the reference that every other engine must equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ngpt.engine.update_cycle import UpdateCycle
from ngpt.optim import AdamW
from ngpt.optim.per_layer_hook import attach


def weight_dtype(precision: str) -> torch.dtype:
    """Dtype of weights and activations under `trainer.precision`."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


class LocalEngine(UpdateCycle):
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
        model = build_model().to(device=device, dtype=dtype)
        optimizer = build_optimizer(model)
        gradients = _WholeGradients(optimizer) if apply == "whole" else _PerLayerGradients(optimizer, apply)
        super().__init__(model, optimizer, gradients, forward=model, device=device, grad_clip=grad_clip)


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

    def scalars(self, loss: Tensor) -> Tensor:
        norms = torch._foreach_norm(self._grads(), 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        return torch.stack([loss.float(), norm, norm, torch.zeros_like(norm)])

    def scale_(self, factor: float) -> None:
        torch._foreach_mul_(self._grads(), factor)  # pyright: ignore[reportPrivateImportUsage]

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
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

    def scalars(self, loss: Tensor) -> Tensor:
        """With several micro-batches the full gradient never exists, and the norm of what was accumulated stands for its own."""
        applied, full = self._updates.norm(), self._updates.full_norm()
        numbers = (loss, applied if full is None else full, applied, self._updates.skipped_in_update())
        return torch.stack([number.float() for number in numbers])

    def scale_(self, factor: float) -> None:
        self._updates.scale_(factor)

    def step(self) -> None:
        self._updates.step()

    def discard(self) -> None:
        self._updates.discard()

    def close(self) -> None:
        self._updates.detach()
