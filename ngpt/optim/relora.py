"""ReLoRA: AdamW on low-rank adapters that are merged into the frozen weights every so often and begin anew (arXiv:2307.05695)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngpt.optim.adamw import AdamW, store_weight_
from ngpt.optim.rounding import generator_for
from ngpt.optim.sharding import WHOLE, Sharding
from ngpt.optim.storage import Stored, compute_dtype

# First counters of random numbers, beside those of ngpt.optim.adamw: new A, and the rounding of a merged W.
RESTART_STREAM, MERGE_STREAM = 8, 9


class ReLoRA(AdamW):
    """AdamW whose parameters include the adapters A (r, n) and B (m, r) of frozen matrices W (m, n), used as W x + scale B A x.

    After every `merge_every`-th update, in `step`: W <- W + scale B A; A is drawn anew from U(-1/sqrt(n), 1/sqrt(n)) and B is zero, so
    that the network computes what it did before; the moments of the `prune` share of A's and B's elements that have the smallest first
    moments become zero (1: of all). The `restart_warmup` updates after a merge run at 1/restart_warmup, 2/restart_warmup, ... of each
    group's rate, for all parameters, which makes the paper's jagged schedule of any schedule. The paper's full-rank warm start is not
    part of it: training begins with the adapters.

    W is no parameter of the optimizer: it has no state, no weight decay and no gradient. A merge into bf16 rounds as `rounding` says:
    "stochastic" or to nearest, also under "master" (A and B have masters there, W has none, which would cost more than all the rest).

    Further state of every parameter: `merged_at` (int64, on the CPU), its update count at the last merge. New A and rounding are
    seeded by `seed`, parameter and update count, so a resumed run repeats them. `step` must end every update, also per-layer ones
    (`per_layer_hook` does so): the merge waits for it, since a weight may not change under a running backward.

    Args:
        adapters: (W, A, B) of each adapted matrix.

    Raises:
        ValueError: as AdamW; or adapters, `scale`, `merge_every`, `restart_warmup` or `prune` are not what they must be.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adapters: Sequence[tuple[Tensor, Tensor, Tensor]],
        scale: float,
        merge_every: int,
        restart_warmup: int = 0,
        prune: float = 0.99,
        state_dtype: str = "fp32",
        rounding: str = "stochastic",
        seed: int = 0,
        sharding: Sharding = WHOLE,
    ) -> None:
        if sharding.is_split:
            raise ValueError(
                "ReLoRA merges and prunes whole adapters, of which a sharding would leave it a part: use LoRA (AdamW on adapters)"
            )
        _check_restarts(scale=scale, merge_every=merge_every, restart_warmup=restart_warmup, prune=prune)
        self._adapters = [tuple(adapter) for adapter in adapters]
        self._restarts = {"scale": scale, "merge_every": merge_every, "restart_warmup": restart_warmup, "prune": prune}
        super().__init__(params, lr, betas, eps, weight_decay, state_dtype=state_dtype, rounding=rounding, seed=seed, sharding=sharding)
        self._check_adapters()
        self._merge_hook = self.register_step_post_hook(_merge_after_step)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adapters": self._adapters, "_restarts": self._restarts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_merge_hook" not in self.__dict__:  # this is a copy, which torch gives no hooks
            self._merge_hook = self.register_step_post_hook(_merge_after_step)

    def _check_adapters(self) -> None:
        own = set(self._parameters())
        if not self._adapters:
            raise ValueError("adapters is empty: give (W, A, B) of every adapted matrix, or use AdamW")
        for number, (weight, down, up) in enumerate(self._adapters):
            shapes = [tuple(tensor.shape) for tensor in (weight, down, up)]
            if any(len(shape) != 2 for shape in shapes) or (up.shape[0], down.shape[1], up.shape[1]) != (*weight.shape, down.shape[0]):
                raise ValueError(f"adapter {number}: W, A, B have shapes {shapes}, but they must be (m, n), (r, n), (m, r)")
            if weight.requires_grad or weight in own:
                raise ValueError(f"adapter {number}: W must be frozen: requires_grad_(False), and in no group of the optimizer")
            if not {down, up} <= own:
                raise ValueError(f"adapter {number}: A and B must be parameters of the optimizer")

    # ------------------------------------------------------------------------------------------------------------ update
    def _allocate(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return super()._allocate(p, group) | {"merged_at": torch.zeros((), dtype=torch.int64)}

    def _is_plain(self, group: dict[str, Any]) -> bool:
        return False  # the rate is lower after a merge

    def _settings_now(self, p: Tensor) -> dict[str, Any]:
        group = self.slot(p).group
        return group | {"lr": float(group["lr"]) * self._warmup_after_merge(p)}

    def _warmup_after_merge(self, p: Tensor) -> float:
        """The factor on the rate of the coming update."""
        done, merged_at = int(self.state[p]["step"]), int(self.state[p]["merged_at"])
        warmup = self._restarts["restart_warmup"]
        return min(1.0, (done - merged_at + 1) / warmup) if merged_at and warmup else 1.0

    # ------------------------------------------------------------------------------------------------------------- merge
    @torch.no_grad()
    def _merge_where_due(self) -> None:
        due = [adapter for adapter in self._adapters if self._is_due(adapter[2])]
        for weight, down, up in due:
            self._merge(weight, down, up)
            self._restart(down, up)
        if due:
            for p in self._parameters():
                self.state[p]["merged_at"].copy_(self.state[p]["step"])

    def _is_due(self, up: Tensor) -> bool:
        done, merged_at = int(self.state[up]["step"]), int(self.state[up]["merged_at"])
        return done != merged_at and done % self._restarts["merge_every"] == 0

    def _merge(self, weight: Tensor, down: Tensor, up: Tensor) -> None:
        """W <- W + scale B A, from the masters of A and B where there are any."""
        slot, dtype = self.slot(up), compute_dtype(weight)
        merged = weight if weight.dtype == dtype else weight.to(dtype)
        merged.addmm_(self._working_copy(up, up).to(dtype), self._working_copy(down, down).to(dtype), alpha=self._restarts["scale"])
        stochastic = slot.group["rounding"] == "stochastic" and weight.dtype == torch.bfloat16
        counters = (slot.group["seed"], MERGE_STREAM, slot.index, int(self.state[up]["step"]))
        store_weight_(weight, merged, generator_for(weight.device, *counters) if stochastic else None)

    def _restart(self, down: Tensor, up: Tensor) -> None:
        """New A, zero B, pruned moments."""
        slot = self.slot(down)
        # Drawn on the CPU: the same A on every device.
        generator = generator_for(torch.device("cpu"), slot.group["seed"], RESTART_STREAM, slot.index, int(self.state[down]["step"]))
        drawn = torch.empty(down.shape, dtype=torch.float32).uniform_(-1, 1, generator=generator).mul_(down.shape[1] ** -0.5)
        for p, values in ((down, drawn), (up, torch.zeros(()))):
            p.copy_(values)
            if "master" in self.state[p]:
                self.state[p]["master"].copy_(values)
            self._prune_moments(p)

    def _prune_moments(self, p: Tensor) -> None:
        first, second = (Stored.of(self.state[p], key, p.shape) for key in ("exp_avg", "exp_avg_sq"))
        m, v = first.read(), second.read()
        prune_moments_(m, v, self._restarts["prune"])
        first.write_(m, None)  # nothing to round: a value is kept, or zero
        second.write_(v, None)


def prune_moments_(first: Tensor, second: Tensor, share: float) -> None:
    """Zero both moments of the `share` of the elements whose first moment is smallest in magnitude; equal ones go together.

    (The published code chooses for each moment by itself. A first moment that is kept above a second one that is not makes a step of any
    size: after a merge the gradient of A is exactly zero, as B is, and the second moment with it.)
    """
    count = round(share * first.numel())
    if count == 0:
        return
    magnitude = first.abs()
    pruned = magnitude <= magnitude.flatten().kthvalue(count).values
    first.masked_fill_(pruned, 0)
    second.masked_fill_(pruned, 0)


def _merge_after_step(optimizer: torch.optim.Optimizer, _arguments: tuple[Any, ...], _keywords: dict[str, Any]) -> None:
    assert isinstance(optimizer, ReLoRA)
    optimizer._merge_where_due()


def _check_restarts(*, scale: float, merge_every: int, restart_warmup: int, prune: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale = {scale!r}, but it must be a finite number > 0 (alpha / rank of LoRA)")
    if merge_every < 1:
        raise ValueError(f"merge_every = {merge_every!r}, but it must be an integer >= 1 (updates between merges)")
    if not 0 <= restart_warmup < merge_every:
        raise ValueError(f"restart_warmup = {restart_warmup!r}, but it must be at least 0 and below merge_every = {merge_every}")
    if not 0 <= prune <= 1:
        raise ValueError(f"prune = {prune!r}, but it must be a share, between 0 and 1")
