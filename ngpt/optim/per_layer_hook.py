"""Per-layer updates: each gradient is reduced the moment backward has finished it, and the full one is freed before the next is born."""

# torch._foreach_* is how torch's own optimizers treat many tensors at once; it is not in torch's __all__.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ngpt.optim.adamw import AdamW
from ngpt.optim.storage import compute_dtype

MODES = ("deferred", "immediate")


def attach(optimizer: AdamW, apply: str = "deferred") -> PerLayerUpdates:
    """Take over the gradients of all trainable parameters of `optimizer` until `detach` is called.

    `deferred`: backward only reduces gradients (projected ones to r/m of their size); `step` then updates layer after layer, so clipping,
    skipping and whole updates stay possible. `immediate`: each layer is updated inside backward: the least memory, but one micro-batch
    per update, no clipping, and a layer whose gradient is not finite is skipped (and counted) while others are not.

    Raises ValueError for an unknown mode, RuntimeError if a parameter already holds a gradient.
    """
    if apply not in MODES:
        raise ValueError(f"apply = {apply!r}, but it must be one of {', '.join(MODES)}")
    return PerLayerUpdates(optimizer, immediate=apply == "immediate")


class GradientHooks:
    """Hands each gradient on the moment backward has finished it, and sees that it comes once a micro-batch.

    Raises RuntimeError if a parameter already holds a gradient.
    """

    def __init__(self, optimizer: AdamW, on_gradient: Callable[[Tensor, Tensor], None]) -> None:
        self._optimizer = optimizer
        self._on_gradient = on_gradient
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        holding = [optimizer.slot(p).name for p in self.parameters if p.grad is not None]
        if holding:
            raise RuntimeError(f"{', '.join(holding)}: holds a gradient already; call zero_grad() before attaching per-layer updates")
        self._handles = [p.register_post_accumulate_grad_hook(self._take) for p in self.parameters]
        self._fired: set[Tensor] = set()

    def begin_micro_batch(self) -> None:
        """Call before each backward."""
        self._fired.clear()

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        if grad is None:
            raise RuntimeError(f"{self._optimizer.slot(p).name}: another hook took its gradient first; detach() what was attached before")
        if p in self._fired:
            raise RuntimeError(
                f"{self._optimizer.slot(p).name}: a second gradient in one micro-batch. begin_micro_batch() or step() was not called, or "
                "the parameter is used in several reentrant checkpoints: use torch.utils.checkpoint with use_reentrant=False"
            )
        self._fired.add(p)
        self._on_gradient(p, grad)

    def detach(self) -> None:
        """Gradients stay in `p.grad` again."""
        for handle in self._handles:
            handle.remove()


class PerLayerUpdates:
    """The handle of `attach`. An update is `begin_update`, `begin_micro_batch` and backward for each micro-batch, `step` or `discard`.

    Where every update has one micro-batch, backward and `step` are enough.
    """

    def __init__(self, optimizer: AdamW, *, immediate: bool) -> None:
        self.optimizer = optimizer
        self.immediate = immediate
        self._hooks = GradientHooks(optimizer, self._on_gradient)
        self._reduced: dict[Tensor, Tensor] = {}
        self._micro_batches = 1
        self._device = optimizer.param_groups[0]["params"][0].device  # where numbers about the whole update are
        self._full_norms: dict[Tensor, Tensor] = {}  # of full gradients, where they are not what is kept
        self._reduced_norms: dict[Tensor, Tensor] = {}  # immediate: taken as gradients come; deferred: of what is kept, once asked for
        self._skipped = {device: torch.zeros((), dtype=torch.int64, device=device) for device in {p.device for p in self._hooks.parameters}}
        self._skipped_before = self._skipped_so_far()

    # ---------------------------------------------------------------------------------------------------------- backward
    def begin_update(self, num_micro_batches: int) -> None:
        """Say how many backward passes this update adds up. Their sum is applied, so divide each loss by what makes that a mean.

        Raises RuntimeError if the last update was left unfinished, and in immediate mode for more than one micro-batch.
        """
        if self.immediate and num_micro_batches != 1:
            raise RuntimeError(
                f"immediate per-layer updates apply every gradient at once, so {num_micro_batches} micro-batches would be as many updates; "
                "use apply='deferred' to accumulate"
            )
        if self._reduced:
            raise RuntimeError("the gradients of the last update were neither applied with step() nor dropped with discard()")
        self._begin_anew()
        self._micro_batches = num_micro_batches
        self._skipped_before = self._skipped_so_far()

    def begin_micro_batch(self) -> None:
        """Call before each backward of an update."""
        self._hooks.begin_micro_batch()

    def _on_gradient(self, p: Tensor, grad: Tensor) -> None:
        kept = self._reduced.get(p)
        reduced = self.optimizer.reduce_gradient(p, grad, first=kept is None)
        if self._micro_batches == 1 and reduced is not grad:
            self._full_norms[p] = _norms([grad])[0]
        if self.immediate:
            self._reduced_norms[p] = _norms([reduced])[0]
            finite = self.optimizer.apply_gradient(p, reduced, guard=True)
            assert finite is not None
            self._skipped[p.device] += ~finite
            return
        self._reduced_norms.clear()
        if kept is None:
            self._reduced[p] = reduced if self._micro_batches == 1 else reduced.to(compute_dtype(p))
        else:
            kept.add_(reduced)

    # ------------------------------------------------------------------------------------------------------------- norms
    def norm(self) -> Tensor:
        """Global norm of what the update is made from: projected matrices in their subspace, all others whole. 0-dim, on the device.

        Call before `step`. It counts every micro-batch and what `scale_` did; it is not finite if any gradient was not.
        """
        return self._root_of_squares(self._norms_of_reduced())

    def full_norm(self) -> Tensor | None:
        """Global norm of the full gradient, before any `scale_`; None with several micro-batches, as their sum never existed."""
        return self._root_of_squares(self._norms_of_reduced() | self._full_norms) if self._micro_batches == 1 else None

    def scale_(self, factor: float | Tensor) -> None:
        """Multiply all gradients of this update by a number, as clipping does. Deferred mode only (RuntimeError)."""
        if self.immediate:
            raise RuntimeError("apply='immediate': gradients were applied during backward and cannot be scaled; use apply='deferred'")
        if self._micro_batches == 1:
            self._full_norms = self._norms_of_reduced() | self._full_norms
        self._reduced_norms.clear()
        for reduced in self._reduced.values():
            reduced.mul_(factor)

    def _norms_of_reduced(self) -> dict[Tensor, Tensor]:
        """Norm of each reduced gradient as it is now. One pass over them, however often it is asked for."""
        if self._reduced and not self._reduced_norms:
            self._reduced_norms = dict(zip(self._reduced, _norms(list(self._reduced.values())), strict=True))
        return self._reduced_norms

    def _root_of_squares(self, norms: dict[Tensor, Tensor]) -> Tensor:
        if not norms:
            return torch.zeros((), device=self._device)
        return torch.linalg.vector_norm(torch.stack([norm.to(self._device, torch.float32) for norm in norms.values()]))

    # ------------------------------------------------------------------------------------------------------------ update
    @torch.no_grad()
    def step(self) -> None:
        """Apply the update, layer after layer, freeing each reduced gradient. (In immediate mode it has been applied already.)"""
        while self._reduced:
            p = next(iter(self._reduced))
            self.optimizer.apply_gradient(p, self._reduced.pop(p))
        self._begin_anew()
        self.optimizer.step()  # finds no gradients; runs step hooks and tells torch's LR schedulers that an update took place

    def discard(self) -> None:
        """Drop the update: weights and optimizer state keep every bit.

        In immediate mode the finite gradients have been applied already and stay applied; the others were skipped.
        """
        for p in self._reduced:
            self.optimizer.drop_gradient(p)
        self._reduced.clear()
        self._begin_anew()

    def skipped_updates(self) -> int:
        """Updates of single parameters that immediate mode skipped so far because their gradient was not finite. Waits for the device."""
        return int(self._skipped_so_far())

    def skipped_in_update(self) -> Tensor:
        """How many of them were skipped since `begin_update`: int64, 0-dim, on the device, so that it can be read with other numbers."""
        return self._skipped_so_far() - self._skipped_before

    def _skipped_so_far(self) -> Tensor:
        return sum((count.to(self._device) for count in self._skipped.values()), torch.zeros((), dtype=torch.int64, device=self._device))

    def live_bytes(self) -> int:
        """Bytes of all gradients that are kept now: the reduced ones, and full ones in `p.grad`, if any."""
        full = [p.grad for p in self._hooks.parameters if p.grad is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self._reduced.values(), *full])

    def detach(self) -> None:
        """Remove the hooks and drop what is kept; afterwards gradients stay in `p.grad` again."""
        self._hooks.detach()
        for p in self._reduced:
            self.optimizer.drop_gradient(p)
        self._reduced.clear()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._hooks.begin_micro_batch()
        self._full_norms.clear()
        self._reduced_norms.clear()
        self._micro_batches = 1


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, in the widest of their compute dtypes; on an accelerator, few kernels."""
    widest = functools.reduce(torch.promote_types, map(compute_dtype, tensors))
    return list(torch._foreach_norm(tensors, 2, dtype=widest))
