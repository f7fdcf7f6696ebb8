"""GaLore and Natural GaLore: Adam on gradients projected to a low-rank subspace, optionally preconditioned by their Fisher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ngpt.optim import adam, natural_gradient, rotation
from ngpt.optim.adamw import BASIS_STREAM, AdamW, compute_dtype, store_weight_
from ngpt.optim.hyper_parameters import check_matrix
from ngpt.optim.projection import find_basis, lift_onto_, project, short_side_first
from ngpt.optim.rounding import generator_for

GOLDEN_RATIO = 0.6180339887498949


class LowRankAdamW(AdamW):
    """AdamW in which groups with the key `rank` are projected: subspace, then preconditioner, then moments, then lift.

    State of a projected matrix besides AdamW's, all with the short side first (a = min(m, n), b = max(m, n)): `basis` (a, r),
    `exp_avg` and `exp_avg_sq` (r, b), `history` (s, r b) and `gram` (s, s) with a history Fisher, and the counters `refreshes` and
    `cleared_at` (the update at which the moments were last set to zero; bias correction counts from there). Basis and history have the
    parameter's dtype, the Gram matrix is fp64, the rest fp32.

    `sum_over_shards` (identity) is called on every sum over the entries of projected gradients, for owners that hold only a part of them.
    """

    def _set_up(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._fresh_bases: dict[Tensor, Tensor] = {}
        self.sum_over_shards = natural_gradient.identity
        super()._set_up(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fresh_bases = {}
        self.__dict__.setdefault("sum_over_shards", natural_gradient.identity)

    # ------------------------------------------------------------------------------------------------------------ groups
    def accepted_keys(self) -> set[str]:
        return super().accepted_keys() | {"rank"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        needs_rank = {"update_proj_gap", "scale", "proj_type"} & set(param_group)
        if needs_rank and "rank" not in param_group:
            raise ValueError(
                f"group {len(self.param_groups)}: {', '.join(sorted(needs_rank))} given without rank; "
                "add rank to project its matrices, or drop the key for plain AdamW"
            )
        super().add_param_group(param_group)

    def _check_parameter(self, p: Tensor, settings: dict[str, Any], label: str) -> None:
        super()._check_parameter(p, settings, label)
        if "rank" in settings:
            check_matrix(p, settings["rank"], label)

    def _is_plain(self, group: dict[str, Any]) -> bool:
        return "rank" not in group

    # ------------------------------------------------------------------------------------------------------------- state
    def _allocate(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if self._is_plain(group):
            return super()._allocate(p, group)
        short, long = short_side_first(p).shape
        rank = short if group["rank"] == "full" else group["rank"]
        dtype = compute_dtype(p)
        state = {key: torch.zeros((), dtype=torch.int64) for key in ("step", "refreshes", "cleared_at")}
        if group["rank"] != "full":
            state["basis"] = torch.zeros(short, rank, dtype=p.dtype, device=p.device)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros(rank, long, dtype=dtype, device=p.device)
        if group["fisher"] == "history":
            state["history"] = torch.zeros(group["history"], rank * long, dtype=p.dtype, device=p.device)
            state["gram"] = torch.zeros(group["history"], group["history"], dtype=torch.float64, device=p.device)
        return state | self._allocate_master(p, group)

    # ---------------------------------------------------------------------------------------------------- first phase: R
    @torch.no_grad()
    def reduce_gradient(self, p: Tensor, grad: Tensor, *, first: bool = True) -> Tensor:
        """The projected gradient P'G, shape (r, b), in fp32; for a plain parameter the gradient itself.

        If a refresh is due and this is the first gradient of the update, its new basis is used from here on, but enters the state only in
        `apply_gradient`: an update that is dropped leaves no trace. A matrix that has no basis yet takes one from its first gradient
        that is neither zero nor non-finite; until then it projects to zero.
        """
        grad = super().reduce_gradient(p, grad, first=first)
        group, state = self.slot(p).group, self.state[p]
        if self._is_plain(group):
            return grad
        grad_ab = short_side_first(grad)
        if "basis" not in state:
            return grad_ab.to(compute_dtype(p))
        if self._refresh_is_due(p, first):
            self._find_fresh_basis(p, grad_ab)
        basis = self._fresh_bases[p] if p in self._fresh_bases else state["basis"]
        return project(grad_ab, basis).to(compute_dtype(p))

    def _refresh_is_due(self, p: Tensor, first: bool) -> bool:
        """Every `update_proj_gap` updates, at a different update for each matrix if staggered, and whenever there is no basis at all.

        The offsets of a golden-ratio sequence are spread evenly for any number of matrices, so a matrix added later moves no other.
        """
        slot, state = self.slot(p), self.state[p]
        if int(state["refreshes"]) == 0 and p not in self._fresh_bases:
            return True
        gap = slot.group["update_proj_gap"]
        offset = int(slot.index * GOLDEN_RATIO % 1 * gap) if slot.group["stagger"] else 0
        return first and (int(state["step"]) + offset) % gap == 0

    def _find_fresh_basis(self, p: Tensor, grad_ab: Tensor) -> None:
        slot, state = self.slot(p), self.state[p]
        refreshes = int(state["refreshes"])
        generator = generator_for(p.device, slot.group["seed"], BASIS_STREAM, slot.index, refreshes)
        previous = state["basis"] if refreshes else None
        basis = find_basis(grad_ab, slot.group["rank"], subspace=slot.group["subspace"], previous_ar=previous, generator=generator)
        if basis is not None:
            self._fresh_bases[p] = basis.to(state["basis"].dtype)

    def drop_gradient(self, p: Tensor) -> None:
        self._fresh_bases.pop(p, None)

    # --------------------------------------------------------------------------------- second phase: state and weight
    def _begin_update(self, p: Tensor) -> None:
        """Enter a fresh basis into the state; moments and history follow it (rotate), stay as they are (keep) or become zero (reset)."""
        fresh = self._fresh_bases.pop(p, None)
        if fresh is None:
            return
        state, group = self.state[p], self.slot(p).group
        if group["on_refresh"] == "rotate":
            self._rotate(state, rotation.change_of_basis(fresh, state["basis"]), group["betas"])
        elif group["on_refresh"] == "reset":
            for key in ("exp_avg", "exp_avg_sq", "history", "gram"):
                if key in state:
                    state[key].zero_()
            state["cleared_at"].copy_(state["step"])
        state["basis"].copy_(fresh)
        state["refreshes"] += 1

    def _rotate(self, state: dict[str, Tensor], change_rr: Tensor, betas: tuple[float, float]) -> None:
        first, second = rotation.rotate_moments(change_rr, state["exp_avg"], state["exp_avg_sq"], betas, _moment_age(state))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        if "history" in state:
            rotation.rotate_history_(change_rr, state["history"])
            state["gram"].copy_(natural_gradient.gram_matrix(state["history"], sum_over_shards=self.sum_over_shards))

    def _update(self, p: Tensor, reduced: Tensor) -> None:
        group, state = self.slot(p).group, self.state[p]
        if self._is_plain(group):
            super()._update(p, reduced)
            return
        direction_rb = self._direction(state, reduced, group)
        lr, decay = float(group["lr"]), group["weight_decay"]
        factor = -group["scale"] * adam.galore_step_size(lr, group["betas"], _moment_age(state))
        weight = self._working_weight(p)
        if "basis" in state:
            lift_onto_(short_side_first(weight), state["basis"], direction_rb, factor)
        else:
            short_side_first(weight).add_(direction_rb, alpha=factor)
        if decay != 0:
            weight.mul_(1 - lr * decay)
        store_weight_(p, weight, self._rounding_generator(p))

    def _direction(self, state: dict[str, Tensor], low_rb: Tensor, group: dict[str, Any]) -> Tensor:
        """N of shape (r, b): natural gradient, then moments. Counts the update."""
        slot = int(state["step"]) % group["history"]
        state["step"] += 1
        if group["fisher"] == "history":
            history, gram = state["history"], state["gram"]
            natural_gradient.remember_(history, gram, low_rb.reshape(-1), slot, sum_over_shards=self.sum_over_shards)
            low_rb = natural_gradient.natural_gradient(history, gram, slot, group["damping"]).to(low_rb.dtype).view(low_rb.shape)
        adam.update_moments_(state["exp_avg"], state["exp_avg_sq"], low_rb, group["betas"])
        return adam.galore_direction(state["exp_avg"], state["exp_avg_sq"], group["eps"])

    def _written_by_update(self, p: Tensor) -> list[Tensor]:
        group, state = self.slot(p).group, self.state[p]
        written = super()._written_by_update(p)
        if "history" in state:
            written += [state["history"][int(state["step"]) % group["history"]], state["gram"]]
        return written


def _moment_age(state: dict[str, Tensor]) -> int:
    """Updates that the moments have seen since they were last zero."""
    return int(state["step"]) - int(state["cleared_at"])


class GaLore(LowRankAdamW):
    """GaLore (arXiv:2403.03507). With the defaults, the published `GaLoreAdamW` on projected groups.

    Group keys `rank` (an integer below both dimensions, or "full"), `update_proj_gap`, `scale` and `proj_type="std"` as in GaLore's
    package; groups without `rank` are updated exactly as by torch.optim.AdamW (GaLore's package has eps and weight decay in another
    order there). `subspace`: "svd" or "randomized". `on_refresh`: "keep" (published), "rotate" or "reset". `stagger` spreads the
    refreshes of the matrices over the updates between two refreshes. See `AdamW` for `rounding` and `seed`. Raises ValueError for
    values that break a rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        subspace: str = "svd",
        on_refresh: str = "keep",
        stagger: bool = False,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self._set_up(params, options | {"proj_type": "std", "fisher": "none", "history": 1, "damping": 1e-3})

    def accepted_keys(self) -> set[str]:
        return super().accepted_keys() - {"fisher", "history", "damping"}


class NaturalGaLore(LowRankAdamW):
    """Natural GaLore (arXiv:2410.16029): GaLore on natural gradients.

    `fisher`: "history", the empirical Fisher damping * I + H H' of the last `history` projected gradients of each matrix, or "none"
    (GaLore). The other arguments are those of `GaLore`, with the defaults that this library recommends. Raises ValueError for values
    that break a rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        fisher: str = "history",
        history: int = 20,
        damping: float = 1e-3,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        subspace: str = "randomized",
        on_refresh: str = "rotate",
        stagger: bool = True,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self._set_up(params, options | {"proj_type": "std"})
