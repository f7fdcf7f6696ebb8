"""Optimizer state as plain tensors: how many bytes of each kind, whether a saved one fits, and copying it without a change of dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KIND = {
    "basis": "basis",
    "basis_long": "basis",
    "exp_avg": "moments",
    "exp_avg_scale": "moments",
    "exp_avg_sq": "moments",
    "exp_avg_sq_scale": "moments",
    "exp_avg_sq_row": "moments",
    "exp_avg_sq_col": "moments",
    "history": "fisher",
    "gram": "fisher",
    "fisher_factor": "fisher",
    "fisher_root": "fisher",
    "short_mean_sq": "fisher",
    "long_mean_sq": "fisher",
    "master": "master",
}  # every other tensor of the state is a counter or a norm: "other"


@dataclass(frozen=True)
class StatePart:
    """One state tensor of one parameter, or the part of it that this process holds: what a checkpoint reads and fills.

    `values` is the live tensor, to be read or written in place. Its last axis is [start, start + count) of the last axis of `shape`, the
    shape of the whole: (numel,) for plain parameters, (r, b) for moments in a subspace, (s, r, b) for a history. What every process
    holds whole has start 0 and the shape of the whole; counters are 0-dim.

    With 8-bit state `values` are flat codes of the part's elements in row-major order, padded to whole blocks, `scales` one fp32
    number a block, and `signed` says which map they are in (`ngpt.optim.quantization`); `count` cannot be told from `values` then.
    """

    values: Tensor
    shape: torch.Size
    start: int
    count: int
    scales: Tensor | None = None
    signed: bool = False

    @property
    def is_whole(self) -> bool:
        return not self.shape or self.count == self.shape[-1]


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of state by kind: basis, moments, fisher, master, other (counters and norms) and total. Exact: every tensor is counted once."""
    sizes: dict[str, int] = dict.fromkeys(("basis", "moments", "fisher", "master", "other"), 0)
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                sizes[KIND.get(key, "other")] += value.numel() * value.element_size()
    return sizes | {"total": sum(sizes.values())}


def check_state_fits(own: Sequence[tuple[str, dict[str, Tensor]]], saved: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises ValueError, naming the first parameter (`own` holds names and states), if saved state has other keys, shapes or dtypes."""
    if len(own) != len(saved):
        raise ValueError(f"the saved state is of {len(saved)} parameters, this optimizer has {len(own)}")
    for (name, tensors), incoming in zip(own, saved, strict=True):
        if set(tensors) != set(incoming):
            raise ValueError(
                f"{name}: the saved state has {sorted(incoming)}, this optimizer keeps {sorted(tensors)}; "
                "it was saved by another optimizer or with other settings"
            )
        for key, tensor in tensors.items():
            if tensor.shape != incoming[key].shape or tensor.dtype != incoming[key].dtype:
                raise ValueError(
                    f"{name}: the saved {key} is {incoming[key].dtype} {tuple(incoming[key].shape)}, this optimizer keeps "
                    f"{tensor.dtype} {tuple(tensor.shape)}; it was saved with other settings (rank, history, precision, ...)"
                )


def copy_state_(own: dict[str, Tensor], incoming: Mapping[str, Tensor]) -> None:
    """Copy the values of `incoming` into the tensors of `own`, which keep their device."""
    for key, tensor in own.items():
        tensor.copy_(incoming[key])
