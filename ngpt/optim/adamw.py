"""AdamW, and what every optimizer here has in common: two-phase updates, checked groups, exact tensor-only state, bf16 rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngpt.optim import adam
from ngpt.optim.hyper_parameters import SCHEDULER_KEYS, check_hyper_parameters
from ngpt.optim.rounding import generator_for, stochastic_round_
from ngpt.optim.sharding import WHOLE, Asking, Publish, Sharding, Sum, alone
from ngpt.optim.state import StatePart, check_state_fits, copy_state_
from ngpt.optim.storage import SIGNED, Stored, allocate, compute_dtype, piece_elements, rows_per_piece
from ngpt.optim.watch import Watch

BASIS_STREAM, ROUNDING_STREAM, MOMENT_STREAM, ROTATION_STREAM = range(4)  # what the random numbers of a parameter are for
COUNTERS = frozenset({"step", "refreshes", "cleared_at", "rank", "merged_at"})  # int64 on the CPU; they move on in a skipped update too


@dataclass(frozen=True)
class Slot:
    """Where a parameter stands in the optimizer: its group, its number over all groups, and its name for messages."""

    group: dict[str, Any]
    index: int
    name: str


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101): on fp32 parameters the same numbers as `torch.optim.AdamW`.

    `params` are parameters, (name, parameter) pairs or groups of either. `rounding` says how new bf16 weights are stored: "stochastic"
    (seeded by `seed`, the parameter's number and its update number, so nothing needs saving), "nearest", or "master" (an fp32 copy in
    the state, taken from the weight when the group is added). It has no effect on fp32 weights; fp16 knows "nearest" and "master", and
    takes "stochastic" as "nearest". `state_dtype` says how moments are kept: "fp32", "bf16" (half the state) or "8bit" (a quarter),
    rounded stochastically, so that changes smaller than a unit are kept on average.

    The update of one parameter has two phases: `reduce_gradient` turns a full gradient into what is kept of it, `apply_gradient`
    updates the state and the weight. `step` is both for each parameter; per-layer updates call them apart. `sharding` says which part of
    parameters and state this process has (all, unless somebody shards); the sharder runs `update`, the coroutine behind `apply_gradient`.

    State per parameter: `step` (int64, on the CPU, so that reading it waits for nothing), `exp_avg`, `exp_avg_sq` (with 8 bits also
    their `_scale`) and, if asked for, `master`: plain tensors, allocated when the group is added. Raises ValueError naming group, key,
    value and rule for what is not accepted.

    `watch`, where it is set, is told of every update while it is active (`ngpt.optim.watch`).
    """

    watch: Watch | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: str = "fp32",
        rounding: str = "stochastic",
        seed: int = 0,
        sharding: Sharding = WHOLE,
    ) -> None:
        self._set_up(params, {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")})

    def _set_up(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        self.sharding: Sharding = options["sharding"]
        defaults = {key: value for key, value in options.items() if key != "sharding"}
        self._slots: dict[Tensor, Slot] = {}
        check_hyper_parameters(defaults, defaults, type(self).__name__)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by torch for a copy, for unpickling and at the end of `load_state_dict`, with new group objects each time."""
        super().__setstate__(state)
        self._slots = {}
        self.__dict__.setdefault("sharding", WHOLE)

    # ------------------------------------------------------------------------------------------------------------ groups
    def accepted_keys(self) -> set[str]:
        """The hyper-parameters that a group may set."""
        return set(self.defaults) - {"differentiable"}  # torch adds that one to the defaults of every optimizer that was copied

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group, add it, allocate the state of its parameters. Raises ValueError, and adds nothing, if anything is wrong."""
        where = f"group {len(self.param_groups)}"
        own_keys = {"params", "param_names", "name"} | SCHEDULER_KEYS
        settings = {key: value for key, value in param_group.items() if key not in own_keys}
        check_hyper_parameters(settings, self.accepted_keys(), where)
        param_group = self._complete_group(param_group, where)
        params = param_group.get("params", [])
        if isinstance(params, set):
            raise ValueError(f"{where}: its parameters are a set, which has no fixed order for a saved state to follow; give a list")
        params = [params] if isinstance(params, Tensor) else list(params)
        if not params:
            raise ValueError(f"{where}: it has no parameters")
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
        taken = {p for group in self.param_groups for p in group["params"]}
        for position, (entry, p) in enumerate(zip(params, tensors, strict=True)):
            label = f"{where}, parameter {entry[0] if isinstance(entry, tuple) else position}"
            if p in taken:
                raise ValueError(f"{label}: it is in this or another group already; every parameter belongs to exactly one")
            taken.add(p)
            self._check_parameter(p, settings, label)
        super().add_param_group({**param_group, "params": params})
        self._slots = {}
        for p in tensors:
            self.state[p] = self._allocate(p, self.slot(p).group)

    def _complete_group(self, param_group: dict[str, Any], where: str) -> dict[str, Any]:
        """The group with what follows from its other settings filled in. Raises ValueError if they do not go together."""
        return param_group

    def _check_parameter(self, p: Tensor, settings: dict[str, Any], label: str) -> None:
        """Raises ValueError if a parameter cannot be in a group with these settings."""
        if not isinstance(p, Tensor) or not p.is_floating_point():
            raise ValueError(f"{label}: {p.dtype if isinstance(p, Tensor) else type(p).__name__} is not a floating-point tensor")

    def slot(self, p: Tensor) -> Slot:
        """The place of a parameter in this optimizer. Raises KeyError for a parameter of somebody else."""
        if not self._slots:
            index = 0
            for group in self.param_groups:
                names = group.get("param_names") or [f"parameter {index + i}" for i in range(len(group["params"]))]
                for name, member in zip(names, group["params"], strict=True):
                    self._slots[member] = Slot(group, index, name)
                    index += 1
        return self._slots[p]

    # ------------------------------------------------------------------------------------------------------------- state
    def _allocate(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.int64)}
        for key in ("exp_avg", "exp_avg_sq"):
            state |= allocate(key, self._own_weight(p).shape, group["state_dtype"], p, self.sharding.state_device(p))
        return state | self._allocate_master(p, group)

    def _allocate_master(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if group["rounding"] != "master" or p.dtype == compute_dtype(p):
            return {}
        return {"master": self._own_weight(p).to(self.sharding.state_device(p), torch.float32, copy=True)}

    def state_parts(self) -> dict[str, StatePart]:
        """Every tensor of the state, or the part of it that is here, by "parameter name/key": live, for checkpoints to read and fill.

        Raises ValueError if names of parameters are not unique, or a parameter is not contiguous.
        """
        parts: dict[str, StatePart] = {}
        for p in self._parameters():
            name = self.slot(p).name
            if f"{name}/step" in parts:
                raise ValueError(f"{name}: two parameters have this name; give the optimizer (name, parameter) pairs with different ones")
            for key in self.state[p]:
                if not key.endswith("_scale"):
                    parts[f"{name}/{key}"] = self._state_part(p, key)
        return parts

    def _state_part(self, p: Tensor, key: str) -> StatePart:
        values = self.state[p][key]
        if values.ndim == 0:
            return StatePart(values, torch.Size(), 0, 0)
        return self._flat_part(p, key)

    def _flat_part(self, p: Tensor, key: str) -> StatePart:
        """A state tensor that goes along with the elements of the weight."""
        numel = self.sharding.shape(p).numel()
        start, stop = self.sharding.span(numel)
        values, scales = self.state[p][key], self.state[p].get(f"{key}_scale")
        if not values.is_contiguous():
            raise ValueError(f"{self.slot(p).name}: its elements are not in row-major order, so they cannot be saved in parts")
        return StatePart(values.view(-1), torch.Size((numel,)), start, stop - start, scales, SIGNED.get(key, False))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly: values are copied into the tensors that this optimizer has, which keep dtype and device.

        (torch alone would put copies of the whole state, cast to the parameter's dtype, beside them.) Hooks of torch work as ever. Raises
        ValueError, and changes nothing, if the state is that of other parameters or of other settings (rank, history, rounding, ...).
        """
        own = [(self.slot(p).name, self.state[p]) for p in self._parameters()]
        saved: list[dict[str, Tensor]] = []

        def take_state(_optimizer: torch.optim.Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            saved.extend(incoming["state"].get(number, {}) for group in incoming["param_groups"] for number in group["params"])
            check_state_fits(own, saved)
            return {**incoming, "state": dict(self.state)}  # torch passes on as it is what has no number of a parameter as its key

        def fill_state(_optimizer: torch.optim.Optimizer) -> None:
            for (_, tensors), values in zip(own, saved, strict=True):
                copy_state_(tensors, values)

        # The last of the pre-hooks, to see what others made of the state; the first of the post-hooks, so that others see the result.
        handles = [
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(fill_state, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # ------------------------------------------------------------------------------------------------------------ update
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `p.grad`; parameters without one are left alone. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            small = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self._watching and self._is_plain(group) and self._state_is_exact(p, group) and p.numel() <= piece_elements(p):
                    small.append(p)
                else:
                    self.apply_gradient(p, self.reduce_gradient(p, p.grad))
            if small:
                self._update_together(small, [self.reduce_gradient(p, p.grad) for p in small], group)
        return loss

    def reduce_gradient(self, p: Tensor, grad: Tensor, *, first: bool = True) -> Tensor:
        """What is kept of a full gradient: here the gradient itself. `first` says that it is the first one of this update of `p`.

        Linear in `grad` within one update, so micro-batches may be added up afterwards. Does not touch weights or state.
        """
        self.check_gradient(p, grad)
        return grad

    def check_gradient(self, p: Tensor, grad: Tensor) -> None:
        """Raises RuntimeError for a gradient of a kind that no method takes."""
        if grad.is_sparse:
            raise RuntimeError(f"{self.slot(p).name}: sparse gradients are not supported; build the embedding with sparse=False")

    def reduced_shape(self, p: Tensor) -> tuple[int, int] | None:
        """Rows and columns of a reduced gradient that is sharded by its columns; None for one that is sharded by flat slices."""
        return None

    def keeps_full_gradient(self, p: Tensor) -> bool:
        """Whether the update of `p` needs its full gradient."""
        return True

    def wants_basis(self, p: Tensor, *, first: bool = True) -> bool:
        """Whether a basis is to be found before the next gradient of `p` is reduced."""
        return False

    def drop_gradient(self, p: Tensor) -> None:
        """Forget whatever `reduce_gradient` prepared for the update of `p` that will not take place."""

    def apply_gradient(self, p: Tensor, reduced: Tensor, *, guard: bool = False) -> Tensor | None:
        """Update state and weight of one parameter from its reduced gradient. Returns and `guard` as in `update`."""
        return alone(self.update(p, reduced, guard=guard))

    @torch.no_grad()
    def update(self, p: Tensor, reduced: Tensor, *, guard: bool = False) -> Asking[Tensor | None]:
        """The second phase as a coroutine: update the state that is here, and the weight, from the part of the reduced gradient here.

        With `guard`, weight and state keep their bits if the reduced gradient is not finite, decided on the device without waiting for
        it; only the counters on the CPU move on. Returns whether it was finite (a bool tensor on the device), or None without `guard`.
        """
        finite = None
        if guard:  # NaN, infinity and overflow all end up in the sum
            finite = (yield Sum(reduced.sum(dtype=compute_dtype(p)))).isfinite()
        watching = self._watching
        before = self._own_weight(p).clone() if watching else None
        if (yield from self._begin_update(p, reduced, finite)):
            yield from self._update(p, reduced, finite)
        else:
            self.state[p]["step"] += 1
        if watching and before is not None:
            about = {"name": self.slot(p).name, "numel": self.sharding.shape(p).numel(), "rank": self.rank_in_use(p)}
            watching.updated(p, **about, full=self.keeps_full_gradient(p), gradient=reduced, before=before, after=self._own_weight(p))
        return finite

    @property
    def _watching(self) -> Watch | None:
        return self.watch if self.watch is not None and self.watch.active else None

    def rank_in_use(self, p: Tensor) -> int | None:
        """Columns of the basis of `p`; None where it has none, or none yet."""
        return None

    def _is_plain(self, group: dict[str, Any]) -> bool:
        """Whether the group's parameters are updated by AdamW as they are."""
        return True

    def _state_is_exact(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether weight and moments are kept in the dtype of the arithmetic."""
        return p.dtype == compute_dtype(p) and group["state_dtype"] == "fp32"

    def _begin_update(self, p: Tensor, reduced: Tensor, finite: Tensor | None) -> Asking[bool]:
        """Make final what `reduce_gradient` prepared. False, with nothing changed, if a guarded update turns out to be one to skip."""
        yield from ()
        return True

    def _update(self, p: Tensor, reduced: Tensor, finite: Tensor | None) -> Asking[None]:
        self._update_in_pieces(p, reduced, self._settings_now(p), finite)
        yield from self._publish(p)

    def _settings_now(self, p: Tensor) -> dict[str, Any]:
        """The group of a parameter with the learning rate of the coming update."""
        return self.slot(p).group

    def _publish(self, p: Tensor) -> Asking[None]:
        """After an update of the flat slice of a weight."""
        if self.sharding.is_split:
            yield Publish(self.sharding.flat(p), p)

    def _update_together(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW on small weights that have the dtype of their moments, all at once: on an accelerator, few kernels."""
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        adam.adamw_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [int(state["step"]) for state in states],
            **_adamw_settings(group),
        )

    def _update_in_pieces(self, p: Tensor, grad: Tensor, group: dict[str, Any], finite: Tensor | None) -> None:
        """AdamW on one weight, some rows at a time, so that temporaries (and wider copies of weight and moments) stay small."""
        state = self.state[p]
        state["step"] += 1
        own = self._own_weight(p)
        stored, grad, working = (torch.atleast_1d(tensor) for tensor in (own, grad, state.get("master", own)))
        rows = rows_per_piece(stored, state)
        pieces = [tensor.split(rows) for tensor in (stored, grad, working)]
        moments = [Stored.of(state, key, stored.shape).split(rows) for key in ("exp_avg", "exp_avg_sq")]
        rounding, moment_rounding = self._rounding_generator(p), self._moment_generator(p, MOMENT_STREAM)
        for target, grad_piece, working_piece, first, second in zip(*pieces, *moments, strict=True):
            written = [target, *([working_piece] if "master" in state else []), *first.tensors(), *second.tensors()]
            with unchanged_unless(finite, written):
                m, v = first.read(), second.read()
                weight = working_piece.to(m.device, compute_dtype(p))
                adam.adamw_([weight], [grad_piece.to(m)], [m], [v], [int(state["step"])], **_adamw_settings(group))
                first.write_(m, moment_rounding)
                second.write_(v, moment_rounding)
                store_weight_(target, weight, rounding)

    # ----------------------------------------------------------------------------------------------------------- weights
    def _own_weight(self, p: Tensor) -> Tensor:
        """The elements of the weight that this process updates: the weight as it is, or a flat slice of it."""
        return self.sharding.flat(p) if self.sharding.is_split else p.detach()

    def _working_copy(self, p: Tensor, stored: Tensor) -> Tensor:
        """The tensor that the arithmetic of an update changes in place: the fp32 weight itself, its master, or a widened copy."""
        if stored.dtype == compute_dtype(stored):
            return stored
        master = self.state[p].get("master")
        return stored.to(torch.float32) if master is None else master

    def _moment_generator(self, p: Tensor, stream: int) -> torch.Generator | None:
        """Source of the random bits with which this update rounds moments, or None where they are not rounded."""
        slot = self.slot(p)
        if slot.group["state_dtype"] == "fp32":
            return None
        device, step = self.state[p]["exp_avg"].device, int(self.state[p]["step"])
        return generator_for(device, slot.group["seed"], stream, slot.index, step, *self._shard_number())

    def _rounding_generator(self, p: Tensor, *, whole: bool = False) -> torch.Generator | None:
        """Source of the random bits of this update's rounding, or None where new weights are rounded to nearest (or not at all).

        `whole` says that the whole weight is rounded, here as on every process that keeps it, so that all draw the same bits.
        """
        slot = self.slot(p)
        if slot.group["rounding"] != "stochastic" or p.dtype != torch.bfloat16:
            return None
        shard = () if whole else self._shard_number()
        return generator_for(p.device, slot.group["seed"], ROUNDING_STREAM, slot.index, int(self.state[p]["step"]), *shard)

    def _shard_number(self) -> tuple[int, ...]:
        """What sets the random numbers of this shard apart from those of the others."""
        return (self.sharding.index,) if self.sharding.parts > 1 else ()


@contextlib.contextmanager
def unchanged_unless(finite: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """What the block does to `tensors` holds only if `finite` (a bool tensor on their device, which nobody waits for; None: it holds)."""
    if finite is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite.to(tensor.device), tensor, old))


def store_weight_(stored: Tensor, weight: Tensor, generator: torch.Generator | None) -> None:
    """Round an updated working weight into the parameter: stochastically if there is a generator."""
    if (stored.dtype, stored.device) == (weight.dtype, weight.device):  # then it is the working weight
        return
    if generator is None:
        stored.copy_(weight)
    else:
        stochastic_round_(stored, weight.to(stored.device), generator)


def _adamw_settings(group: dict[str, Any]) -> dict[str, Any]:
    return {"lr": float(group["lr"]), "betas": group["betas"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
