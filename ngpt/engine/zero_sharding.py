"""ZeRO for optimizers of projected gradients: what is summed, who keeps what, and how the updates of a layer share collectives.

Stage 0 keeps everything whole on every rank, 1 shards optimizer state, 2 accumulated gradients too, 3 weights as well (somebody else
partitions them). A layer's gradients are taken as backward finishes them: projected ones at once, so that only R = P'G (r, b) is summed;
those of full-space methods and of plain parameters whole. All of a layer travel in one reduction, of which every rank gets its part
(`ngpt.optim.sharding`: flat slices and columns). An update then runs the coroutines of a layer's parameters in lock-step.

The order of the collectives is fixed by the model, never by the order in which gradients happen to come, and a parameter without a
gradient on some rank counts as zero there: ranks cannot fall out of step. A parameter that no rank has used is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ngpt.dist.collectives import Collectives
from ngpt.engine.layer_gradients import Layer
from ngpt.engine.lock_step import run_together
from ngpt.optim import AdamW
from ngpt.optim.per_layer_hook import MODES, GradientHooks
from ngpt.optim.sharding import Sharding


class Weights(Protocol):
    """Where the weights are, if not whole in the parameters."""

    def shape(self, p: Tensor) -> torch.Size:
        """Shape of the whole weight."""
        ...

    def flat(self, p: Tensor) -> Tensor:
        """This rank's flat slice of ceil(numel / N) elements, without padding, to be changed in place."""
        ...


class ZeroSharding(Sharding):
    """Which part of parameters and state a rank has at a stage; to be given to the optimizer's constructor.

    `weights` must be given at stage 3 and at no other. With `offload` the large parts of the optimizer state are in the CPU's memory, and
    what is made of them is computed there.
    """

    def __init__(self, ranks: Collectives, *, stage: int, weights: Weights | None = None, offload: bool = False) -> None:
        assert (stage == 3) == (weights is not None)
        self.parts = 1 if stage == 0 else ranks.size
        self.index = 0 if stage == 0 else ranks.rank
        self.stage = stage
        self.keeps_weights_whole = weights is None
        self._weights = weights
        self._offload = offload

    @property
    def is_split(self) -> bool:
        return super().is_split or self._offload  # what is computed elsewhere comes back as a flat slice

    def state_device(self, p: Tensor) -> torch.device:
        return torch.device("cpu") if self._offload else p.device

    def shape(self, p: Tensor) -> torch.Size:
        return p.shape if self._weights is None else self._weights.shape(p)

    def flat(self, p: Tensor) -> Tensor:
        return super().flat(p) if self._weights is None else self._weights.flat(p)


class ShardedUpdates:
    """Per-layer updates over many ranks. An update is `begin_update`, then `begin_micro_batch`, backward and `end_micro_batch` for each
    micro-batch, `scalars`, and `step` or `discard`.

    Gradients of all micro-batches and ranks are added up, so divide each loss by what makes the sum a mean over all of them.

    Args:
        optimizer: with a `ZeroSharding` over the same ranks.
        parameters: all of the optimizer's, in the order of the model.
        apply: `deferred`, or `immediate`: each layer is updated inside backward as soon as its gradients are summed.
        communication_dtype: of gradients and directions on the wire (None: that of the weights).
    """

    def __init__(
        self,
        optimizer: AdamW,
        parameters: Iterable[Tensor],
        ranks: Collectives,
        *,
        apply: str,
        communication_dtype: torch.dtype | None = None,
    ) -> None:
        if apply not in MODES:
            raise ValueError(f"apply = {apply!r}, but it must be one of {', '.join(MODES)}")
        assert isinstance(optimizer.sharding, ZeroSharding)
        self.optimizer = optimizer
        self.immediate = apply == "immediate"
        self._sharding = optimizer.sharding
        self._ranks = ranks
        self._hooks = GradientHooks(optimizer, self._on_gradient)
        wire = communication_dtype or self._hooks.parameters[0].dtype
        self._run = functools.partial(run_together, sharding=self._sharding, ranks=ranks, wire=wire)
        self._layers = [Layer(optimizer, params, ranks, wire) for params in layers_of(optimizer, parameters)]
        self._layer_of = {p: layer for layer in self._layers for p in layer.params}
        self._next = 0  # the layer whose reduction starts next
        self._micro_batch, self._micro_batches = 0, 1
        self._device = self._hooks.parameters[0].device
        self._begin_anew()

    # ---------------------------------------------------------------------------------------------------------- backward
    def begin_update(self, num_micro_batches: int) -> None:
        """Say how many backward passes this update adds up. Raises RuntimeError for several of them in immediate mode."""
        if self.immediate and num_micro_batches != 1:
            raise RuntimeError(
                f"immediate per-layer updates apply every gradient at once, so {num_micro_batches} micro-batches would be as many updates; "
                "use apply='deferred' to accumulate"
            )
        self._begin_anew()
        self._micro_batches = num_micro_batches

    def begin_micro_batch(self) -> None:
        """Call before each backward."""
        self._hooks.begin_micro_batch()
        self._next = 0
        for layer in self._layers:
            # Where gradients are not sharded they wait, unsummed, for the last micro-batch.
            layer.begin(first=self._micro_batch == 0, keep=self._sharding.stage < 2, last=self._micro_batch + 1 == self._micro_batches)

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """Call after each backward: layers in which parameters have got no gradient are summed now."""
        while self._next < len(self._layers):
            self._start_next()
        self._micro_batch += 1

    def all_finite(self, value: Tensor) -> bool:
        """Whether a number is finite on all ranks: what has to be known of a loss before a backward that cannot be taken back."""
        return not self._ranks.any(not bool(value.isfinite()), self._device)

    def _on_gradient(self, p: Tensor, grad: Tensor) -> None:
        layer = self._layer_of[p]
        if layer.keeps_matrices and not layer.received:  # of one layer only are full gradients kept at a time
            for other in self._layers[: self._next]:
                if other.keeps_matrices:
                    other.collect()
        layer.receive(p, grad)
        while self._next < len(self._layers) and self._layers[self._next].is_complete:
            self._start_next()

    def _start_next(self) -> None:
        layer = self._layers[self._next]
        self._next += 1
        self._run(layer.searches(), over_ranks=True)
        layer.start_reduction()
        for other in self._layers[
            max(0, self._next - 3) : self._next - 2
        ]:  # two are on their way beside backward, buffers of the rest are free
            other.collect()
        if self.immediate:
            self._update_layer(layer, guard=True)

    # ----------------------------------------------------------------------------------------------------------- scalars
    def scalars(self, loss: Tensor) -> Tensor:
        """(4,) fp32 of all ranks together: the sum of `loss`, norm of the gradient, norm of what will be applied, matrices left out.

        Call once, after the last micro-batch. Both norms are that of what the update is made from, projected matrices in their subspace:
        the full gradient of all ranks never exists.
        """
        square = self._square_of_applied
        for layer in self._layers:
            layer.collect()
            square = square + layer.square()
        if self._sharding.parts == 1 and self._ranks.rank > 0:
            square = torch.zeros_like(square)  # every rank has all of it: count it once
        total = self._ranks.sum_(torch.stack([loss.double().to(self._device), square]))
        norm = total[1].sqrt()
        return torch.stack([total[0], norm, norm, self._skipped.double()]).float()

    def scale_(self, factor: float) -> None:
        """Multiply all gradients of this update by a number, as clipping does. Deferred mode only (RuntimeError)."""
        if self.immediate:
            raise RuntimeError("apply='immediate': gradients were applied during backward and cannot be scaled; use apply='deferred'")
        for layer in self._layers:
            layer.scale_(factor)

    def live_bytes(self) -> int:
        """Bytes of all gradients, buffers and accumulators that are kept now."""
        return sum(layer.live_bytes() for layer in self._layers)

    # ------------------------------------------------------------------------------------------------------------ update
    @torch.no_grad()
    def step(self) -> None:
        """Apply the update, layer after layer, freeing each one's gradients. (In immediate mode it has been applied already.)"""
        if not self.immediate:
            for layer in self._layers:
                layer.collect()
            counts = torch.cat([layer.counts() for layer in self._layers]).tolist()
            for layer in self._layers:
                used, counts = counts[: len(layer.params)], counts[len(layer.params) :]
                self._apply([p for p, count in zip(layer.params, used, strict=True) if count], layer, guard=False)
        self._begin_anew()
        self.optimizer.step()  # finds no gradients; runs step hooks and tells torch's LR schedulers that an update took place

    def discard(self) -> None:
        """Drop the update: weights and optimizer state keep every bit. (What immediate mode has applied stays applied.)"""
        self._begin_anew()

    def detach(self) -> None:
        """Remove the hooks and drop what is kept."""
        self._hooks.detach()
        self._begin_anew()

    def _update_layer(self, layer: Layer, *, guard: bool) -> None:
        layer.collect()
        self._square_of_applied = self._square_of_applied + layer.square()
        # What has come here is in use; only what has not must be asked of the device.
        missing = [p for p in layer.params if p not in layer.received]
        unused = {p for p, count in zip(layer.params, layer.counts().tolist(), strict=True) if not count} if missing else set()
        self._apply([p for p in layer.params if p not in unused], layer, guard=guard)

    def _apply(self, params: list[Tensor], layer: Layer, *, guard: bool) -> None:
        finite = self._run([self.optimizer.update(p, layer.part(p), guard=guard) for p in params])
        self._skipped += sum((~answer.to(self._device) for answer in finite if answer is not None), torch.zeros_like(self._skipped))
        layer.clear()

    def _begin_anew(self) -> None:
        for layer in self._layers:
            layer.clear()
        self._hooks.begin_micro_batch()
        self._micro_batch, self._micro_batches = 0, 1
        self._skipped = torch.zeros((), dtype=torch.int64, device=self._device)
        self._square_of_applied = torch.zeros((), dtype=torch.float64, device=self._device)


def layers_of(optimizer: AdamW, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The trainable ones of `parameters`, grouped by their names up to the first number, in the order of backward.

    Embedding, head and final norm have no number and are a group each. Backward is taken to meet the layers in the reverse order.
    """
    layers: dict[str, list[Tensor]] = {}
    for p in parameters:
        if p.requires_grad:
            layers.setdefault(_layer_name(optimizer.slot(p).name), []).append(p)
    return list(reversed(layers.values()))


def _layer_name(name: str) -> str:
    """`model.layers.3` for `model.layers.3.mlp.up_proj.weight`, the name itself where it has no number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])
