"""The one update of all projected matrices, put together from parts: subspace, preconditioner, moments, complement, rank policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngpt.optim import complement, diagonal_fisher, factored_fisher, moments, natural_gradient, rotation
from ngpt.optim.adamw import BASIS_STREAM, COUNTERS, MOMENT_STREAM, ROTATION_STREAM, AdamW, store_weight_, unchanged_unless
from ngpt.optim.change import Bases, Change
from ngpt.optim.hyper_parameters import PROJECTION_KEYS, check_matrix, complete_parts
from ngpt.optim.projection import at_size_one, basis_and_energies, cheap_basis, lift_onto_, project, search_basis, short_side_first
from ngpt.optim.rounding import generator_for
from ngpt.optim.sharding import Asking, Columns, Flat, OfFirst, Sum, alone
from ngpt.optim.state import StatePart
from ngpt.optim.storage import SIGNED, compute_dtype, zeros

GOLDEN_RATIO = 0.6180339887498949
FIRST_TURNS = 20  # updates over which a staggered run spreads the first search for the bases of its matrices
CONVERGENCE_INTERVAL = 10  # updates between two looks at whether the projected gradient has converged: a look waits for the device


class LowRankAdamW(AdamW):
    """AdamW in which groups with the key `rank` are projected.

    State of a projected matrix, with the short side first (a = min(m, n), b = max(m, n)): `basis` (a, r) and, if both sides are
    projected, `basis_long` (b, r); `exp_avg` (r, b) and, as `moments` needs, `exp_avg_sq` (r, b) or its row and column factors; with a
    Fisher, `history` (s, r b) and `gram` (s, s), or `fisher_factor` and `fisher_root` (r (r + 1) / 2), or `short_mean_sq` (a) and
    `long_mean_sq` (b); where the growth of the update is limited, `update_norm`; where the rank adapts, `rank`, `low_norm` and
    `low_norm_at_refresh`; and the counters `refreshes` and `cleared_at` (the update at which the moments were last set to zero; bias
    correction counts from there). Bases, history and root have the parameter's dtype, moments that of `state_dtype`, the Gram matrix is
    fp64, the rest fp32. Where the state is sharded, b stands for the columns that are here.
    """

    def _set_up(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        self._fresh_bases: dict[Tensor, Bases] = {}
        super()._set_up(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fresh_bases = {}

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
            check_matrix(self.sharding.shape(p), settings["rank"], label)

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
        (short, long), rank = sorted(self.sharding.shape(p)), self._largest_rank(p, group)
        own, there = self._own_columns(p, group), self.sharding.state_device(p)
        state = {key: torch.zeros((), dtype=torch.int64) for key in ("step", "refreshes", "cleared_at")}
        if group["rank"] != "full":
            state["basis"] = zeros([short, rank], p.dtype, p.device)
        if group["proj_type"] == "full":
            state["basis_long"] = zeros([long, rank], p.dtype, p.device)
        if group["min_rank"] is not None:
            state["rank"] = torch.tensor(rank, dtype=torch.int64)
            for key in ("low_norm", "low_norm_at_refresh"):
                state[key] = zeros([], compute_dtype(p), p.device)
        state |= moments.allocate_moments(group["moments"], torch.Size((rank, own)), group["state_dtype"], p, there)
        match group["fisher"]:
            case "history" | "two_sided":
                state["history"] = zeros([group["history"], rank * own], p.dtype, there)
                state["gram"] = zeros([group["history"], group["history"]], torch.float64, p.device)
            case "factored":
                state |= factored_fisher.allocate_factor(rank, p)
            case "diagonal":
                state |= diagonal_fisher.allocate_means(short, own, compute_dtype(p), p.device)
        if group["complement"] != "none" or group["fisher"] == "diagonal":
            state["update_norm"] = zeros([], compute_dtype(p), p.device)
        return state | self._allocate_master(p, group)

    def reduced_shape(self, p: Tensor) -> tuple[int, int] | None:
        if self._is_plain(self.slot(p).group):
            return None
        group, state = self.slot(p).group, self.state[p]
        if self.keeps_full_gradient(p):
            short, long = sorted(self.sharding.shape(p))
            return short, long
        basis, *_ = self._fresh_bases.get(p) or self._bases(state)
        return basis.shape[1], self._width(p, group)

    def _largest_rank(self, p: Tensor, group: dict[str, Any]) -> int:
        """Rows of the projected gradient, at most."""
        return min(self.sharding.shape(p)) if group["rank"] == "full" else group["rank"]

    def _width(self, p: Tensor, group: dict[str, Any]) -> int:
        """Columns of the projected gradient, over all shards."""
        return self._largest_rank(p, group) if group["proj_type"] == "full" else max(self.sharding.shape(p))

    def _own_columns(self, p: Tensor, group: dict[str, Any]) -> int:
        start, stop = self.sharding.span(self._width(p, group))
        return stop - start

    def _state_part(self, p: Tensor, key: str) -> StatePart:
        group, state = self.slot(p).group, self.state[p]
        values = state[key]
        if self._is_plain(group) or key == "master" or values.ndim == 0:
            return super()._state_part(p, key)
        width, own = self._width(p, group), self._own_columns(p, group)
        start, _ = self.sharding.span(width)
        if key in ("exp_avg", "exp_avg_sq"):
            scales = state.get(f"{key}_scale")
            whole = torch.Size((self._largest_rank(p, group), width))
            return StatePart(values, whole, start, own, scales, SIGNED[key])
        if key == "history":
            rank = self._largest_rank(p, group)
            return StatePart(values.view(len(values), rank, own), torch.Size((len(values), rank, width)), start, own)
        if key in ("long_mean_sq", "exp_avg_sq_col"):
            return StatePart(values, torch.Size((width,)), start, own)
        return StatePart(values, values.shape, 0, values.shape[-1])

    def _written_by_update(self, p: Tensor) -> list[Tensor]:
        """The state (or views of the parts) on the device that the update of a matrix is about to change."""
        group, state = self.slot(p).group, self.state[p]
        written = [state[key] for key in state if key not in COUNTERS | {"basis", "basis_long", "history", "master"}]
        if "history" in state:
            written.append(state["history"][int(state["step"]) % group["history"]])
        return written

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
        if self.wants_basis(p, first=first):
            alone(self.prepare_basis(p, short_side_first(grad), first=first))
        return self.project(p, short_side_first(grad))

    def project(self, p: Tensor, grad_ab: Tensor) -> Tensor:
        """R of a gradient, or of a part of its columns, in the basis of this update."""
        bases = self._fresh_bases.get(p) or self._bases(self.state[p])
        low = project(grad_ab, bases[0]) if len(bases) > 0 else grad_ab
        for basis_br in bases[1:]:
            low = low @ basis_br
        if bases and (watching := self._watching):
            watching.projected(p, grad_ab, low)
        return low.to(compute_dtype(p))

    def rank_in_use(self, p: Tensor) -> int | None:
        state = self.state[p]
        return self._bases(state)[0].shape[1] if "basis" in state and int(state["refreshes"]) else None

    def wants_basis(self, p: Tensor, *, first: bool = True) -> bool:
        """Whether a new basis is to be found before the next gradient of `p`, the first one of its update or not, is projected."""
        state = self.state[p]
        if self._is_plain(self.slot(p).group) or "basis" not in state or p in self._fresh_bases:
            return False
        return int(state["refreshes"]) == 0 or (first and self._refresh_is_due(p))

    @torch.no_grad()
    def prepare_basis(self, p: Tensor, grad_ab: Tensor, *, first: bool = True, columns: bool = False) -> Asking[None]:
        """Find new bases; what shows no direction (zero, not finite) chooses none.

        `grad_ab` is a term of the gradient, the short side first, or these `columns` of it.
        """
        in_earnest = (first and self._refresh_is_due(p)) or not self.slot(p).group["stagger"]
        bases = yield from self._find_bases(p, grad_ab, first=first, in_earnest=in_earnest, columns=columns)
        if bases is not None:
            # A copy, as the basis may be a view of all singular vectors, and is kept until all gradients are there.
            self._fresh_bases[p] = tuple(basis.to(p.dtype, copy=True) for basis in bases)

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

    def _find_bases(self, p: Tensor, grad_ab: Tensor, *, first: bool, in_earnest: bool, columns: bool) -> Asking[Bases | None]:
        """New bases from a gradient, or None. If not in earnest, the cheapest ones, until the turn of the matrix comes."""
        group = self.slot(p).group
        thin = in_earnest and group["subspace"] != "svd" and group["min_rank"] is None
        if thin:
            scaled_ab = yield from at_size_one(grad_ab)
        else:  # what is not linear in the gradient needs all of it: exact singular vectors, energies of rows, the share of a rank
            scaled_ab = (yield Columns(grad_ab, max(self.sharding.shape(p)))) if columns else (yield Sum(grad_ab.to(compute_dtype(p))))
        if scaled_ab is None:
            return None
        bases = []
        for side in range(2 if "basis_long" in self.state[p] else 1):
            side_grad = scaled_ab.mT if side else scaled_ab
            if thin:
                settings = self._search_settings(p, side)
                basis, _ = yield from search_basis(side_grad, group["rank"], subspace=group["subspace"], **settings, columns=columns)
            elif in_earnest:
                basis = self._search_basis(p, side_grad, side, first)
            else:
                basis = cheap_basis(side_grad, group["rank"])
            if basis is None:
                return None
            bases.append((yield OfFirst(basis)))
        return tuple(bases)

    def _search_settings(self, p: Tensor, side: int) -> dict[str, Any]:
        slot, state = self.slot(p), self.state[p]
        refreshes = int(state["refreshes"])
        return {
            "previous_ar": self._bases(state)[side] if refreshes else None,
            "generator": generator_for(p.device, slot.group["seed"], BASIS_STREAM, slot.index, refreshes, side),
        }

    def _search_basis(self, p: Tensor, side_grad: Tensor, side: int, first: bool) -> Tensor | None:
        group = self.slot(p).group
        found = basis_and_energies(side_grad, group["rank"], subspace=group["subspace"], **self._search_settings(p, side))
        if found is None:
            return None
        basis_ar, energies_r = found
        # After the first micro-batch the rank stays: what is kept of the others, zero as there was no basis, has as many rows.
        return basis_ar[:, : self._rank_for(energies_r, group)] if first else basis_ar

    def _rank_for(self, energies: Tensor, group: dict[str, Any]) -> int:
        """The smallest rank that keeps the share `energy` of the squared gradient, between `min_rank` and `rank`."""
        if group["min_rank"] is None:
            return group["rank"]
        cumulative = energies.cpu().cumsum(0)  # on a GPU in an order of its own: trainer.deterministic refuses it there
        too_small = int((cumulative < group["energy"]).sum())
        return min(max(too_small + 1, group["min_rank"]), group["rank"])

    def drop_gradient(self, p: Tensor) -> None:
        self._fresh_bases.pop(p, None)

    # --------------------------------------------------------------------------------- second phase: state and weight
    def _begin_update(self, p: Tensor, reduced: Tensor, finite: Tensor | None) -> Asking[bool]:
        """Enter fresh bases into the state; moments and Fisher follow them (rotate), stay as they are (keep) or become zero (reset)."""
        if self.keeps_full_gradient(p) and self.wants_basis(p):
            yield from self.prepare_basis(p, self._columns_of(p, reduced), columns=True)
        fresh = self._fresh_bases.pop(p, None)
        if fresh is None:
            return True
        if finite is not None and not finite:  # waits for the device, as a refresh does anyway
            return False
        state, group = self.state[p], self.slot(p).group
        old = self._bases(state)
        if group["on_refresh"] == "rotate" and _moment_age(state) > 0:
            yield from self._rotate(p, tuple(rotation.change_of_basis(new, was) for new, was in zip(fresh, old, strict=True)))
        elif group["on_refresh"] == "reset":
            moments.clear_moments_(state)
            for key in ("history", "gram", "fisher_factor", "fisher_root"):
                if key in state:
                    state[key].zero_()
            state["cleared_at"].copy_(state["step"])
        if self.watch is not None and int(state["refreshes"]):
            self.watch.turned(p, fresh[0], old[0])
        for key, basis in zip(("basis", "basis_long"), fresh, strict=False):
            state[key].zero_()[:, : basis.shape[1]] = basis
        if "rank" in state:
            state["rank"].fill_(fresh[0].shape[1])
            state["low_norm_at_refresh"].zero_()
        state["refreshes"] += 1
        return True

    def _rotate(self, p: Tensor, changes: Sequence[Tensor]) -> Asking[None]:
        state, group = self.state[p], self.slot(p).group
        shape = torch.Size((changes[0].shape[1], self._own_columns(p, group)))
        values = moments.read_moments(group["moments"], state, shape)
        if len(changes) > 1:  # columns are mixed too
            for key in sorted(values.keys() - {"exp_avg_sq_row"}):
                values[key] = (yield Columns(values[key].to(p.device), self._width(p, group))).to(values[key].device)
        changes_there = tuple(change_rr.to(values["exp_avg"].device) for change_rr in changes)
        rotated = moments.rotated_moments(values, changes_there, group["betas"], _moment_age(state))
        if len(changes) > 1:
            rotated = {key: value if key == "exp_avg_sq_row" else self._own_part(value) for key, value in rotated.items()}
        moments.replace_moments_(state, rotated, self._moment_generator(p, ROTATION_STREAM))
        if "history" in state:
            yield from self._rotate_history(p, changes_there)
        if "fisher_factor" in state:
            factored_fisher.rotate_factor_(state, changes[0])
            self._find_root(state, group, changes[0].shape[0])

    def _rotate_history(self, p: Tensor, changes: Sequence[Tensor]) -> Asking[None]:
        """h <- C h, or C h C_long' if both sides are projected, and the Gram matrix anew."""
        history, gram = self.state[p]["history"], self.state[p]["gram"]
        if len(changes) == 1:
            rotation.rotate_history_(changes[0], history)
        else:
            for row_k in history:
                columns = row_k.to(p.device).view(changes[0].shape[1], -1)
                row_rr = (yield Columns(columns, self._width(p, self.slot(p).group))).to(changes[0])
                row_k.copy_(self._own_part(changes[0] @ row_rr @ changes[1].mT).reshape(-1))
        gram.copy_((yield Sum(natural_gradient.gram_matrix(history).to(gram.device))))

    def _own_part(self, whole: Tensor) -> Tensor:
        """The columns that are here."""
        return whole[..., slice(*self.sharding.span(whole.shape[-1]))]

    def _columns_of(self, p: Tensor, reduced: Tensor) -> Tensor:
        """A gradient with its short side first; what a sharder hands over is so already."""
        return reduced if self.sharding.is_split else short_side_first(reduced)

    def _update(self, p: Tensor, reduced: Tensor, finite: Tensor | None) -> Asking[None]:
        if self._is_plain(self.slot(p).group):
            yield from super()._update(p, reduced, finite)
            return
        with unchanged_unless(finite, self._written_by_update(p)):
            change = yield from self._change(p, reduced)
        if not self.sharding.is_split:
            self._change_whole(p, change, finite)
        elif self.keeps_full_gradient(p) or self._lifts_columns(p):
            self._change_slice(p, (yield Flat(change.columns(), p)), change.factor, finite)
            yield from self._publish(p)
        else:
            assert change.low is not None
            low = yield Columns(change.low, self._width(p, self.slot(p).group), as_weight=True)
            change = dataclasses.replace(change, low=low)  # r b numbers were sent; every process lifts them by itself
            if self.sharding.keeps_weights_whole and "master" not in self.state[p]:
                self._change_whole(p, change, finite)
            else:
                shape = self.sharding.shape(p)
                elements = change.elements(*self.sharding.span(shape.numel()), shape)
                self._change_slice(p, elements, change.factor, finite)
                yield from self._publish(p)

    def _lifts_columns(self, p: Tensor) -> bool:
        """Whether to lift the columns that are here, and exchange them for a slice, rather than gather L and lift the slice.

        A slice of a tall matrix is about its columns of the change: nothing is sent. Of a wide one 1/N of the matrix is.
        """
        if self.slot(p).group["proj_type"] == "full" or (self.sharding.keeps_weights_whole and "master" not in self.state[p]):
            return False
        rows, columns = self.sharding.shape(p)
        return rows >= columns or self.sharding.parts * self._largest_rank(p, self.slot(p).group) >= 2 * rows

    def _change(self, p: Tensor, reduced: Tensor) -> Asking[Change]:
        """Update the state. Returns what is to become of the weight, of which these columns are here."""
        group, state = self.slot(p).group, self.state[p]
        keeps_full = self.keeps_full_gradient(p)
        grad_ab = self._columns_of(p, reduced) if keeps_full else None
        low = reduced if grad_ab is None else self.project(p, grad_ab)
        natural = yield from self._precondition(p, low)  # counts the update
        rounding = self._moment_generator(p, MOMENT_STREAM)
        natural, row_means = natural.to(state["exp_avg"].device), None
        if group["moments"] == "adafactor":
            row_means = (yield Sum(moments.row_means(natural, self._width(p, group)).to(p.device))).to(natural.device)
        direction = moments.direction(group["moments"], state, natural, group["betas"], group["eps"], rounding, row_means).to(p.device)
        correction = moments.step_factor(group["moments"], group["betas"], _moment_age(state))
        factor = -group["scale"] * float(group["lr"])
        if "low_norm" in state:
            self._watch_convergence(state, (yield from _norm(low)))
        if grad_ab is not None and group["fisher"] == "diagonal":
            return (yield from self._diagonal_change(p, grad_ab, low, direction * correction, factor))
        if grad_ab is not None and group["complement"] == "fira":
            return (yield from self._fira_change(p, grad_ab, low, direction, factor * correction))
        return Change(self._bases(state), direction, factor * correction)

    def _change_whole(self, p: Tensor, change: Change, finite: Tensor | None) -> None:
        """W <- W + change - lr decay W, for a weight that is all here, as is the change."""
        group = self.slot(p).group
        with unchanged_unless(finite, [p, *([self.state[p]["master"]] if "master" in self.state[p] else [])]):
            weight = self._working_copy(p, p)
            change.add_to_(short_side_first(weight), change.factor)
            if group["weight_decay"] != 0:
                weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
            store_weight_(p, weight, self._rounding_generator(p, whole=True))

    def _change_slice(self, p: Tensor, change: Tensor, factor: float, finite: Tensor | None) -> None:
        """The same for the flat slice of a weight and its part of the change."""
        group, own = self.slot(p).group, self._own_weight(p)
        with unchanged_unless(finite, [own, *([self.state[p]["master"]] if "master" in self.state[p] else [])]):
            weight = self._working_copy(p, own)
            weight.add_(change.to(weight.device), alpha=factor)
            if group["weight_decay"] != 0:
                weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
            store_weight_(own, weight, self._rounding_generator(p))

    def _precondition(self, p: Tensor, low: Tensor) -> Asking[Tensor]:
        """The natural gradient in the subspace: the inverse Fisher, or a root of it, times R. Counts the update."""
        state, group = self.state[p], self.slot(p).group
        state["step"] += 1
        match group["fisher"]:
            case "history" | "two_sided":
                history, gram = state["history"], state["gram"]
                position = (int(state["step"]) - 1) % group["history"]
                products_s = natural_gradient.remember_(history, low.to(history.device).reshape(-1), position)
                natural_gradient.enter_row_(gram, (yield Sum(products_s.to(gram.device))), position)
                gram = gram.to(history.device)
                return natural_gradient.natural_gradient(history, gram, position, group["damping"]).to(low.dtype).view(low.shape)
            case "factored":
                covariance = yield Sum(factored_fisher.covariance(low, self._width(p, group)))
                factored_fisher.remember_(state, covariance, group["betas"][1])
                if (int(state["step"]) + self.slot(p).index) % factored_fisher.ROOT_INTERVAL == 0:
                    self._find_root(state, group, low.shape[0])
                elif _moment_age(state) <= factored_fisher.ROOT_INTERVAL:
                    factored_fisher.start_root_(state, low.shape[0], group["betas"][1], _moment_age(state))
                return factored_fisher.apply_root(state, low)
        return low

    def _find_root(self, state: dict[str, Tensor], group: dict[str, Any], rank: int) -> None:
        factored_fisher.find_root_(state, rank, group["betas"][1], _moment_age(state), group["damping"])

    def _diagonal_change(self, p: Tensor, grad_ab: Tensor, low: Tensor, mean: Tensor, factor: float) -> Asking[Change]:
        """D o (P M^ + G - P P'G), or D o P M^ without the complement, its growth limited; M^ is `mean`, D = diag(u) diag(w)."""
        state, group = self.state[p], self.slot(p).group
        row_means_a, column_means_b = diagonal_fisher.mean_squares(grad_ab, max(self.sharding.shape(p)), compute_dtype(p))
        diagonal_fisher.remember_(state, (yield Sum(row_means_a)), column_means_b, group["betas"][1])
        u_a, w_b = diagonal_fisher.scales(state, group["betas"][1], int(state["step"]), group["damping"])
        if "basis" not in state:
            update_ab = mean * w_b
        elif group["complement"] == "raw":
            update_ab = grad_ab * w_b
            lift_onto_(update_ab, self._bases(state)[0], (mean - low) * w_b, 1.0)
        else:
            update_ab = torch.zeros_like(grad_ab, dtype=mean.dtype)
            lift_onto_(update_ab, self._bases(state)[0], mean * w_b, 1.0)
        norm = yield from _norm(u_a * torch.linalg.vector_norm(update_ab, dim=1))
        rows_a = u_a * complement.limit_growth_(state["update_norm"], norm)
        return Change((), None, factor, full_ab=update_ab, rows_a=rows_a)

    def _fira_change(self, p: Tensor, grad_ab: Tensor, low_rb: Tensor, direction_rb: Tensor, factor: float) -> Asking[Change]:
        """P N + k phi o (G - P R) as k phi o G and P (N - k phi o R)."""
        state = self.state[p]
        scale_b = complement.fira_scale(direction_rb, low_rb)
        norm = (yield Sum(complement.scaled_complement_sq(scale_b, grad_ab, low_rb))).sqrt()
        scale_b = scale_b * complement.limit_growth_(state["update_norm"], norm)
        return Change(self._bases(state), direction_rb.addcmul_(low_rb, scale_b, value=-1), factor, full_ab=grad_ab, columns_b=scale_b)

    def _watch_convergence(self, state: dict[str, Tensor], norm: Tensor) -> None:
        at_refresh = state["low_norm_at_refresh"]
        state["low_norm"].copy_(norm)
        at_refresh.copy_(torch.where(at_refresh > 0, at_refresh, norm))  # a refresh sets it to zero


def _norm(part: Tensor) -> Asking[Tensor]:
    """The L2 norm over all shards of a tensor of which this is a part."""
    return (yield Sum(torch.linalg.vector_norm(part, dtype=torch.float64).square())).sqrt().to(part.dtype)


def _moment_age(state: dict[str, Tensor]) -> int:
    """Updates that the moments have seen since they were last zero."""
    return int(state["step"]) - int(state["cleared_at"])
