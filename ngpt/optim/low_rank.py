"""The one update of all projected matrices, put together from parts: subspace, preconditioner, moments, complement, rank policy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ngpt.optim import complement, diagonal_fisher, factored_fisher, moments, natural_gradient, rotation
from ngpt.optim.adamw import BASIS_STREAM, COUNTERS, MOMENT_STREAM, ROTATION_STREAM, AdamW, store_weight_, unchanged_unless
from ngpt.optim.hyper_parameters import PROJECTION_KEYS, check_matrix, complete_parts
from ngpt.optim.projection import basis_and_energies, cheap_basis, lift_onto_, project, short_side_first
from ngpt.optim.rounding import generator_for
from ngpt.optim.storage import compute_dtype, zeros

GOLDEN_RATIO = 0.6180339887498949
FIRST_TURNS = 20  # updates over which a staggered run spreads the first search for the bases of its matrices
CONVERGENCE_INTERVAL = 10  # updates between two looks at whether the projected gradient has converged: a look waits for the device

Bases = tuple[Tensor, ...]  # (a, r) of the short side; where both sides are projected, (b, r) of the long side too


class LowRankAdamW(AdamW):
    """AdamW in which groups with the key `rank` are projected.

    State of a projected matrix, with the short side first (a = min(m, n), b = max(m, n)): `basis` (a, r) and, if both sides are
    projected, `basis_long` (b, r); `exp_avg` (r, b) and, as `moments` needs, `exp_avg_sq` (r, b) or its row and column factors; with a
    Fisher, `history` (s, r b) and `gram` (s, s), or `fisher_factor` and `fisher_root` (r (r + 1) / 2), or `short_mean_sq` (a) and
    `long_mean_sq` (b); where the growth of the update is limited, `update_norm`; where the rank adapts, `rank`, `low_norm` and
    `low_norm_at_refresh`; and the counters `refreshes` and `cleared_at` (the update at which the moments were last set to zero; bias
    correction counts from there). Bases, history and root have the parameter's dtype, moments that of `state_dtype`, the Gram matrix is
    fp64, the rest fp32.

    `sum_over_shards` (identity) is called on the sums over projected gradients that history and factored Fisher need, for owners that hold
    only a part of their columns. (Factored second moments, complements, the diagonal Fisher and the look at convergence take whole ones.)
    """

    def _set_up(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._fresh_bases: dict[Tensor, Bases] = {}
        self.sum_over_shards = natural_gradient.identity
        super()._set_up(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fresh_bases = {}
        self.__dict__.setdefault("sum_over_shards", natural_gradient.identity)

    # ------------------------------------------------------------------------------------------------------------ groups
    def accepted_keys(self) -> set[str]:
        return super().accepted_keys() | {"rank"}

    def _complete_group(self, param_group: dict[str, Any], where: str) -> dict[str, Any]:
        if "rank" in param_group:
            return complete_parts(param_group, self.defaults, where)
        needs_rank = PROJECTION_KEYS & set(param_group)
        if needs_rank:
            raise ValueError(
                f"{where}: {', '.join(sorted(needs_rank))} given without rank; "
                "add rank to project its matrices, or drop the key for plain AdamW"
            )
        return param_group

    def _check_parameter(self, p: Tensor, settings: dict[str, Any], label: str) -> None:
        super()._check_parameter(p, settings, label)
        if "rank" in settings:
            check_matrix(p, settings["rank"], label)

    def _is_plain(self, group: dict[str, Any]) -> bool:
        return "rank" not in group

    def keeps_full_gradient(self, p: Tensor) -> bool:
        """Whether the update of `p` needs its full gradient: not only matrices with a complement or a diagonal Fisher, plain ones too."""
        group = self.slot(p).group
        return self._is_plain(group) or group["rank"] == "full" or group["fisher"] == "diagonal" or group["complement"] != "none"

    # ------------------------------------------------------------------------------------------------------------- state
    def _allocate(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if self._is_plain(group):
            return super()._allocate(p, group)
        short, long = short_side_first(p).shape
        rank = short if group["rank"] == "full" else group["rank"]
        state = {key: torch.zeros((), dtype=torch.int64) for key in ("step", "refreshes", "cleared_at")}
        width = long
        if group["rank"] != "full":
            state["basis"] = zeros([short, rank], p.dtype, p.device)
        if group["proj_type"] == "full":
            state["basis_long"] = zeros([long, rank], p.dtype, p.device)
            width = rank
        if group["min_rank"] is not None:
            state["rank"] = torch.tensor(rank, dtype=torch.int64)
            for key in ("low_norm", "low_norm_at_refresh"):
                state[key] = zeros([], compute_dtype(p), p.device)
        state |= moments.allocate_moments(group["moments"], torch.Size((rank, width)), group["state_dtype"], p)
        match group["fisher"]:
            case "history" | "two_sided":
                state["history"] = zeros([group["history"], rank * width], p.dtype, p.device)
                state["gram"] = zeros([group["history"], group["history"]], torch.float64, p.device)
            case "factored":
                state |= factored_fisher.allocate_factor(rank, p)
            case "diagonal":
                state |= diagonal_fisher.allocate_means(short, long, compute_dtype(p), p.device)
        if group["complement"] != "none" or group["fisher"] == "diagonal":
            state["update_norm"] = zeros([], compute_dtype(p), p.device)
        return state | self._allocate_master(p, group)

    def _written_by_update(self, p: Tensor) -> list[Tensor]:
        """The tensors (or views of the parts) on the device that the update of a matrix is about to change."""
        group, state = self.slot(p).group, self.state[p]
        written = [state[key] for key in state if key not in COUNTERS | {"basis", "basis_long", "history"}]
        if "history" in state:
            written.append(state["history"][int(state["step"]) % group["history"]])
        return [p, *written]

    def _bases(self, state: dict[str, Tensor]) -> Bases:
        """The bases in use, cut to the rank in use."""
        rank = int(state["rank"]) if "rank" in state else None
        return tuple(state[key][:, :rank] for key in ("basis", "basis_long") if key in state)

    # ---------------------------------------------------------------------------------------------------- first phase: R
    @torch.no_grad()
    def reduce_gradient(self, p: Tensor, grad: Tensor, *, first: bool = True) -> Tensor:
        """The projected gradient P'G, shape (r, b), in fp32 (P'G Q of shape (r, r) if both sides are projected).

        For a plain parameter, and where the update needs the full gradient, that gradient itself. If a refresh is due and this is the first
        gradient of the update, its new basis is used from here on, but enters the state only in `apply_gradient`: an update that is
        dropped leaves no trace. A matrix that has no basis yet takes one from its first gradient that is neither zero nor non-finite;
        until then it projects to zero.
        """
        grad = super().reduce_gradient(p, grad, first=first)
        if self.keeps_full_gradient(p):
            return grad
        self._prepare_basis(p, grad, first)
        return self._project(p, grad)

    def _project(self, p: Tensor, grad: Tensor) -> Tensor:
        state = self.state[p]
        bases = self._fresh_bases.get(p) or self._bases(state)
        grad_ab = short_side_first(grad)
        low = project(grad_ab, bases[0]) if len(bases) > 0 else grad_ab
        for basis_br in bases[1:]:
            low = low @ basis_br
        return low.to(compute_dtype(p))

    def _prepare_basis(self, p: Tensor, grad: Tensor, first: bool) -> None:
        """Find new bases for `p` if a refresh is due; what shows no direction (zero, not finite) chooses none."""
        state = self.state[p]
        if "basis" not in state or p in self._fresh_bases:
            return
        due = first and self._refresh_is_due(p)
        if due or int(state["refreshes"]) == 0:
            bases = self._find_bases(p, short_side_first(grad), first=first, in_earnest=due or not self.slot(p).group["stagger"])
            if bases is not None:
                # A copy, as the basis may be a view of all singular vectors, and is kept until all gradients are there.
                self._fresh_bases[p] = tuple(basis.to(state["basis"].dtype, copy=True) for basis in bases)

    def _refresh_is_due(self, p: Tensor) -> bool:
        """Every `update_proj_gap` updates and, if the group asks for it, when the projected gradient has converged.

        If staggered, each matrix at an update of its own: the offsets of a golden-ratio sequence are spread evenly for any number of
        matrices, so a matrix added later moves no other. Its first turn comes within `FIRST_TURNS` updates.
        """
        slot, state = self.slot(p), self.state[p]
        step, gap = int(state["step"]), slot.group["update_proj_gap"]
        turn = slot.index * GOLDEN_RATIO % 1 if slot.group["stagger"] else 0
        first_turn = int(turn * min(gap, FIRST_TURNS))
        return step == first_turn or (step > first_turn and (step + int(turn * gap)) % gap == 0) or self._has_converged(p, step)

    def _has_converged(self, p: Tensor, step: int) -> bool:
        state, group = self.state[p], self.slot(p).group
        if not group["converged_below"] or step == 0 or step % CONVERGENCE_INTERVAL:
            return False
        return bool(state["low_norm"] <= group["converged_below"] * state["low_norm_at_refresh"])

    def _find_bases(self, p: Tensor, grad_ab: Tensor, *, first: bool, in_earnest: bool) -> Bases | None:
        """New bases from a gradient, or None. If not in earnest, the cheapest ones, until the turn of the matrix comes."""
        sides = [grad_ab, grad_ab.mT][: 2 if "basis_long" in self.state[p] else 1]
        if in_earnest:
            bases = [self._search_basis(p, side_grad, side, first) for side, side_grad in enumerate(sides)]
        else:
            bases = [cheap_basis(side_grad, self.slot(p).group["rank"]) for side_grad in sides]
        return None if any(basis is None for basis in bases) else tuple(basis for basis in bases if basis is not None)

    def _search_basis(self, p: Tensor, side_grad: Tensor, side: int, first: bool) -> Tensor | None:
        slot, state = self.slot(p), self.state[p]
        refreshes = int(state["refreshes"])
        found = basis_and_energies(
            side_grad,
            slot.group["rank"],
            subspace=slot.group["subspace"],
            previous_ar=self._bases(state)[side] if refreshes else None,
            generator=generator_for(p.device, slot.group["seed"], BASIS_STREAM, slot.index, refreshes, side),
        )
        if found is None:
            return None
        basis_ar, energies_r = found
        # After the first micro-batch the rank stays: what is kept of the others, zero as there was no basis, has as many rows.
        return basis_ar[:, : self._rank_for(energies_r, slot.group)] if first else basis_ar

    def _rank_for(self, energies: Tensor, group: dict[str, Any]) -> int:
        """The smallest rank that keeps the share `energy` of the squared gradient, between `min_rank` and `rank`."""
        if group["min_rank"] is None:
            return group["rank"]
        too_small = int((energies.cumsum(0) < group["energy"]).sum())
        return min(max(too_small + 1, group["min_rank"]), group["rank"])

    def drop_gradient(self, p: Tensor) -> None:
        self._fresh_bases.pop(p, None)

    # --------------------------------------------------------------------------------- second phase: state and weight
    def _begin_update(self, p: Tensor, reduced: Tensor, finite: Tensor | None) -> bool:
        """Enter fresh bases into the state; moments and Fisher follow them (rotate), stay as they are (keep) or become zero (reset)."""
        if not self._is_plain(self.slot(p).group) and self.keeps_full_gradient(p):
            self._prepare_basis(p, reduced, True)
        fresh = self._fresh_bases.pop(p, None)
        if fresh is None:
            return True
        if finite is not None and not finite:  # waits for the device, as a refresh does anyway
            return False
        state, group = self.state[p], self.slot(p).group
        old = self._bases(state)
        if group["on_refresh"] == "rotate" and _moment_age(state) > 0:
            self._rotate(p, *(rotation.change_of_basis(new, was) for new, was in zip(fresh, old, strict=True)))
        elif group["on_refresh"] == "reset":
            moments.clear_moments_(state)
            for key in ("history", "gram", "fisher_factor", "fisher_root"):
                if key in state:
                    state[key].zero_()
            state["cleared_at"].copy_(state["step"])
        for key, basis in zip(("basis", "basis_long"), fresh, strict=False):
            state[key].zero_()[:, : basis.shape[1]] = basis
        if "rank" in state:
            state["rank"].fill_(fresh[0].shape[1])
            state["low_norm_at_refresh"].zero_()
        state["refreshes"] += 1
        return True

    def _rotate(self, p: Tensor, change_rr: Tensor, *long_change_rr: Tensor) -> None:
        state, group = self.state[p], self.slot(p).group
        changes = (change_rr, *long_change_rr)
        width = long_change_rr[0].shape[1] if long_change_rr else max(p.shape)
        generator = self._moment_generator(p, ROTATION_STREAM)
        moments.rotate_moments_(group["moments"], state, changes, width, group["betas"], _moment_age(state), generator)
        if "history" in state:
            rotation.rotate_history_(change_rr, state["history"], *long_change_rr)
            state["gram"].copy_(natural_gradient.gram_matrix(state["history"], sum_over_shards=self.sum_over_shards))
        if "fisher_factor" in state:
            factored_fisher.rotate_factor_(state, change_rr)
            self._find_root(state, group, change_rr.shape[0])

    def _update(self, p: Tensor, reduced: Tensor, finite: Tensor | None) -> None:
        if self._is_plain(self.slot(p).group):
            super()._update(p, reduced, finite)
            return
        with unchanged_unless(finite, self._written_by_update(p)):
            self._update_matrix(p, reduced)

    def _update_matrix(self, p: Tensor, reduced: Tensor) -> None:
        group, state = self.slot(p).group, self.state[p]
        low = self._project(p, reduced) if self.keeps_full_gradient(p) else reduced
        natural = self._precondition(p, low)  # counts the update
        rounding = self._moment_generator(p, MOMENT_STREAM)
        direction = moments.direction(group["moments"], state, natural, group["betas"], group["eps"], rounding)
        correction = moments.step_factor(group["moments"], group["betas"], _moment_age(state))
        lr, decay = float(group["lr"]), group["weight_decay"]
        weight = self._working_weight(p)
        weight_ab = short_side_first(weight)
        if group["fisher"] == "diagonal":
            update_ab, u_a = self._diagonal_update(state, group, short_side_first(reduced), low, direction * correction)
            norm = torch.linalg.vector_norm(u_a * torch.linalg.vector_norm(update_ab, dim=1))
            u_a = u_a * complement.limit_growth_(state["update_norm"], norm)
            weight_ab.addcmul_(update_ab, u_a[:, None], value=-group["scale"] * lr)
        else:
            factor = -group["scale"] * lr * correction
            if group["complement"] == "fira":
                self._apply_complement_(state, weight_ab, short_side_first(reduced), low, direction, factor)
            self._lift_onto_(weight_ab, state, direction, factor)
        if decay != 0:
            weight.mul_(1 - lr * decay)
        store_weight_(p, weight, self._rounding_generator(p))
        if "low_norm" in state:
            self._watch_convergence(state, low)

    def _lift_onto_(self, target_ab: Tensor, state: dict[str, Tensor], low: Tensor, factor: float) -> None:
        """X <- X + factor P N, or P N Q', or N where nothing is projected."""
        bases = self._bases(state)
        for basis_br in bases[1:]:
            low = low.to(basis_br.dtype) @ basis_br.mT
        if len(bases) > 0:
            lift_onto_(target_ab, bases[0], low, factor)
        else:
            target_ab.add_(low, alpha=factor)

    def _precondition(self, p: Tensor, low: Tensor) -> Tensor:
        """The natural gradient in the subspace: the inverse Fisher, or a root of it, times R. Counts the update."""
        state, group = self.state[p], self.slot(p).group
        state["step"] += 1
        match group["fisher"]:
            case "history" | "two_sided":
                history, gram = state["history"], state["gram"]
                position = (int(state["step"]) - 1) % group["history"]
                natural_gradient.remember_(history, gram, low.reshape(-1), position, sum_over_shards=self.sum_over_shards)
                return natural_gradient.natural_gradient(history, gram, position, group["damping"]).to(low.dtype).view(low.shape)
            case "factored":
                covariance_rr = self.sum_over_shards(low @ low.mT) / max(p.shape)
                factored_fisher.remember_(state, covariance_rr, group["betas"][1])
                if (int(state["step"]) + self.slot(p).index) % factored_fisher.ROOT_INTERVAL == 0:
                    self._find_root(state, group, low.shape[0])
                elif _moment_age(state) <= factored_fisher.ROOT_INTERVAL:
                    factored_fisher.start_root_(state, low.shape[0], group["betas"][1], _moment_age(state))
                return factored_fisher.apply_root(state, low)
        return low

    def _find_root(self, state: dict[str, Tensor], group: dict[str, Any], rank: int) -> None:
        factored_fisher.find_root_(state, rank, group["betas"][1], _moment_age(state), group["damping"])

    def _diagonal_update(
        self, state: dict[str, Tensor], group: dict[str, Any], grad_ab: Tensor, low: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        """D o (P M^ + G - P P'G), or D o P M^ without the complement, as (X, u) with D o (...) = diag(u) X; M^ is `mean`."""
        diagonal_fisher.remember_(state, grad_ab, group["betas"][1])
        u_a, w_b = diagonal_fisher.scales(state, group["betas"][1], int(state["step"]), group["damping"])
        if "basis" not in state:
            return mean * w_b, u_a
        if group["complement"] == "raw":
            update_ab = grad_ab * w_b
            self._lift_onto_(update_ab, state, (mean - low) * w_b, 1.0)
        else:
            update_ab = torch.zeros_like(grad_ab, dtype=mean.dtype)
            self._lift_onto_(update_ab, state, mean * w_b, 1.0)
        return update_ab, u_a

    def _apply_complement_(
        self, state: dict[str, Tensor], weight_ab: Tensor, grad_ab: Tensor, low_rb: Tensor, direction_rb: Tensor, factor: float
    ) -> None:
        """W <- W + factor k phi o G, and N <- N - k phi o R, so that lifting N completes P N + k phi o (G - P R)."""
        scale_b = complement.fira_scale(direction_rb, low_rb)
        norm = complement.scaled_complement_norm(scale_b, grad_ab, low_rb)
        scale_b = scale_b * complement.limit_growth_(state["update_norm"], norm)
        weight_ab.addcmul_(grad_ab.to(weight_ab.dtype), scale_b, value=factor)
        direction_rb.addcmul_(low_rb, scale_b, value=-1)

    def _watch_convergence(self, state: dict[str, Tensor], low: Tensor) -> None:
        norm, at_refresh = torch.linalg.vector_norm(low), state["low_norm_at_refresh"]
        state["low_norm"].copy_(norm)
        at_refresh.copy_(torch.where(at_refresh > 0, at_refresh, norm))  # a refresh sets it to zero


def _moment_age(state: dict[str, Tensor]) -> int:
    """Updates that the moments have seen since they were last zero."""
    return int(state["step"]) - int(state["cleared_at"])
