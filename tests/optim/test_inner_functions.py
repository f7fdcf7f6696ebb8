"""The pure functions can be compiled without a graph break and then give the same numbers; an update does not wait for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ngpt.optim import (
    GaLore,
    adam,
    complement,
    diagonal_fisher,
    factored_fisher,
    low_rank,
    natural_gradient,
    projection,
    quantization,
    rotation,
)
from ngpt.optim.adamw import COUNTERS, AdamW

BETAS = (0.9, 0.99)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def factored() -> dict[str, Tensor]:
    state = factored_fisher.allocate_factor(4, torch.zeros(1))
    factored_fisher.remember_(state, factored_fisher.covariance(random(4, 9), 1), 0.9)
    return state


def diagonal() -> dict[str, Tensor]:
    return diagonal_fisher.allocate_means(6, 9, torch.float32, torch.device("cpu"))


def quantized(signed: bool) -> tuple[Tensor, Tensor]:
    codes, scales = torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    quantization.quantize_(codes, scales, random(300).abs(), signed=signed, generator=None)
    return codes, scales


ADAMW = {"lr": 0.1, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.1}
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "adam.update_moments_": (adam.update_moments_, lambda: (random(4, 9), random(4, 9).abs(), random(4, 9), BETAS)),
    "adam.galore_direction": (
        lambda first, second, out: adam.galore_direction(first, second, 1e-6, out=out),
        lambda: (random(4, 9), random(4, 9).abs(), random(4, 9)),
    ),
    "adam.adamw_": (
        functools.partial(adam.adamw_, **ADAMW),
        lambda: (
            [random(5), random(4, 9)],
            [random(5), random(4, 9)],
            [random(5), random(4, 9)],
            [random(5) ** 2, random(4, 9) ** 2],
            [3, 4],
        ),
    ),
    "rotation.change_of_basis": (rotation.change_of_basis, lambda: (random(8, 3), random(8, 4))),
    "rotation.rotate_moments": (rotation.rotate_moments, lambda: (random(3, 4), random(4, 9), random(4, 9).abs(), BETAS, 5)),
    "rotation.rotate_history_": (rotation.rotate_history_, lambda: (random(4, 4), random(3, 36))),
    "natural_gradient.remember_": (natural_gradient.remember_, lambda: (random(3, 36), random(36), 1)),
    "natural_gradient.enter_row_": (natural_gradient.enter_row_, lambda: (torch.zeros(3, 3).double(), random(3).double(), 1)),
    "natural_gradient.natural_gradient": (
        natural_gradient.natural_gradient,
        lambda: (random(3, 36), natural_gradient.gram_matrix(random(3, 36)), 1, 0.1),
    ),
    "natural_gradient.gram_matrix": (natural_gradient.gram_matrix, lambda: (random(3, 36),)),
    "complement.fira_scale": (complement.fira_scale, lambda: (random(4, 9), random(4, 9))),
    "complement.scaled_complement_sq": (complement.scaled_complement_sq, lambda: (random(9), random(6, 9), random(4, 9) / 9)),
    "complement.limit_growth_": (complement.limit_growth_, lambda: (torch.tensor(1.0), torch.tensor(3.0))),
    "diagonal_fisher.mean_squares": (diagonal_fisher.mean_squares, lambda: (random(6, 9), 9, torch.float32)),
    "diagonal_fisher.remember_": (diagonal_fisher.remember_, lambda: (diagonal(), random(6) ** 2, random(9) ** 2, 0.9)),
    "diagonal_fisher.scales": (diagonal_fisher.scales, lambda: ({key: value + 1 for key, value in diagonal().items()}, 0.9, 3, 1e-3)),
    "factored_fisher.covariance": (factored_fisher.covariance, lambda: (random(4, 9), 9)),
    "factored_fisher.remember_": (factored_fisher.remember_, lambda: (factored(), random(10), 0.9)),
    "factored_fisher.find_root_": (factored_fisher.find_root_, lambda: (factored(), 4, 0.9, 3, 1e-3)),
    "factored_fisher.start_root_": (factored_fisher.start_root_, lambda: (factored(), 4, 0.9, 3)),
    "factored_fisher.apply_root": (factored_fisher.apply_root, lambda: (factored() | {"fisher_root": random(10)}, random(4, 9))),
    "factored_fisher.rotate_factor_": (factored_fisher.rotate_factor_, lambda: (factored(), random(4, 4))),
    "projection.project": (projection.project, lambda: (random(6, 9), random(6, 4))),
    "projection.lift_onto_": (projection.lift_onto_, lambda: (random(6, 9), random(6, 4), random(4, 9), 0.5)),
    "quantization.dequantize, signed": (functools.partial(quantization.dequantize, signed=True), lambda: quantized(True)),
    "quantization.dequantize, unsigned": (functools.partial(quantization.dequantize, signed=False), lambda: quantized(False)),
    "quantization.quantize_, signed": (
        functools.partial(quantization.quantize_, signed=True, generator=None),
        lambda: (*quantized(True), random(300)),
    ),
    "quantization.quantize_, unsigned": (
        functools.partial(quantization.quantize_, signed=False, generator=None),
        lambda: (*quantized(False), random(300).abs()),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_compiled_function_gives_the_same_numbers(name: str) -> None:
    """Random numbers apart: a generator as an argument is what torch.compile does not trace."""
    function, arguments = FUNCTIONS[name]
    plain, compiled = arguments(), arguments()
    expected = function(*plain)
    torch.compiler.reset()
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(result, expected)
    for mine, theirs in zip(tree_leaves(compiled), tree_leaves(plain), strict=True):  # what is changed in place
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------------------------------------- no synchronisation
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "_linalg_check_errors", "item")


class Device(TorchDispatchMode):
    """Fails where an operation would wait for a device if every tensor but the counters were on one."""

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__()
        self.counters = {state[key].data_ptr() for state in optimizer.state.values() for key in COUNTERS if key in state}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        waits = name in WAITING or (name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in tensors))
        if waits and not all(t.data_ptr() in self.counters for t in tensors):
            raise AssertionError(f"{name} on {[tuple(t.shape) for t in tensors]} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, "fp32"), (torch.bfloat16, "8bit")], ids=str)
def test_an_update_away_from_a_refresh_never_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, make, groups_of, give_gradients, dtype: torch.dtype, state_dtype: str
) -> None:
    """No root of a factored Fisher (every 20 updates), a factorisation, is among these updates, and no look at convergence (every 10)."""
    monkeypatch.setattr(low_rank, "FIRST_TURNS", 2)
    optimizer = make(groups_of(dtype, update_proj_gap=1000), state_dtype=state_dtype)
    for index in range(6):
        give_gradients(optimizer, index)
        if index < 2:
            optimizer.step()
            continue
        with Device(optimizer):
            if index % 2:
                optimizer.step()
            else:
                for p in [p for group in optimizer.param_groups for p in group["params"]]:
                    optimizer.apply_gradient(p, optimizer.reduce_gradient(p, p.grad), guard=True)


def test_the_watch_of_the_test_above_sees_a_refresh_wait(groups_of, give_gradients) -> None:
    optimizer = GaLore(groups_of())
    give_gradients(optimizer, 0)
    with Device(optimizer), pytest.raises(AssertionError, match=r"_local_scalar_dense on .* waits"):
        optimizer.step()
