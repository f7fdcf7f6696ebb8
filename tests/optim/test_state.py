"""Optimizer state: complete from the start, plain tensors, and exact through every way of saving it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups, state_bytes

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda model, **options: AdamW(model.named_parameters(), lr=0.01, **options),
    "galore": lambda model, **options: GaLore(low_rank_groups(model, rank=4, update_proj_gap=3), lr=0.01, **options),
    "galore reset": lambda model, **options: GaLore(
        low_rank_groups(model, rank=4, update_proj_gap=3), lr=0.01, on_refresh="reset", subspace="randomized", **options
    ),
    "natural galore": lambda model, **options: NaturalGaLore(
        low_rank_groups(model, rank=4, update_proj_gap=3), lr=0.01, history=4, **options
    ),
}
methods = pytest.mark.parametrize("method", METHODS)
precisions = pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "nearest"), (torch.bfloat16, "master")],
)


def same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    pairs = zip(one.state.values(), other.state.values(), strict=True)
    return all(
        set(mine) == set(theirs) and all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine)
        for mine, theirs in pairs
    )


@methods
@precisions
@pytest.mark.parametrize("steps_before", [1, 2, 3, 4])
def test_a_saved_run_continues_bit_for_bit(
    make_network, train, identical, method: str, dtype: torch.dtype, rounding: str, steps_before: int
) -> None:
    network = make_network(dtype)
    optimizer = METHODS[method](network, rounding=rounding)
    train(network, optimizer, range(steps_before))
    file = io.BytesIO()
    torch.save({"weights": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make_network(dtype)
    resumed.load_state_dict(saved["weights"])
    other = METHODS[method](resumed, rounding=rounding)
    other.load_state_dict(saved["optimizer"])
    assert same_state(optimizer, other)
    batches = range(steps_before, steps_before + 8)
    assert train(network, optimizer, batches) == train(resumed, other, batches)
    assert identical(network, resumed)
    assert same_state(optimizer, other)


@methods
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copied_run_continues_bit_for_bit(make_network, train, identical, method: str, way: Callable[[Any], Any]) -> None:
    network = make_network(torch.bfloat16)
    optimizer = METHODS[method](network)
    train(network, optimizer, range(4))
    twin, twin_optimizer = way((network, optimizer))
    assert train(network, optimizer, range(4, 9)) == train(twin, twin_optimizer, range(4, 9))
    assert identical(network, twin)
    extra = nn.Parameter(torch.ones(3))
    twin_optimizer.add_param_group({"params": [("extra", extra)]})
    twin_optimizer.load_state_dict(copy.deepcopy(twin_optimizer.state_dict()))


@methods
def test_state_is_complete_before_the_first_step_and_holds_tensors_only(make_network, train, method: str) -> None:
    network = make_network(torch.bfloat16)
    optimizer = METHODS[method](network, rounding="master")
    before = {p: {key: (value.shape, value.dtype) for key, value in state.items()} for p, state in optimizer.state.items()}
    assert set(before) == set(network.parameters())
    train(network, optimizer, range(4))
    after = {p: {key: (value.shape, value.dtype) for key, value in state.items()} for p, state in optimizer.state.items()}
    assert before == after
    for state in optimizer.state.values():
        for key in ("step", "refreshes", "cleared_at"):
            if key in state:
                assert (state[key].dtype, state[key].device.type) == (torch.int64, "cpu")


def test_loading_does_not_alias_the_loaded_tensors(make_network, train) -> None:
    network = make_network()
    optimizer = METHODS["natural galore"](network)
    train(network, optimizer, range(2))
    saved = optimizer.state_dict()
    twin = make_network()
    other = METHODS["natural galore"](twin)
    other.load_state_dict(saved)
    train(twin, other, range(3))
    pairs = zip(optimizer.state.values(), other.state.values(), strict=True)
    assert all(mine[key].data_ptr() != theirs[key].data_ptr() for mine, theirs in pairs for key in mine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, r"basis is .* \(12, 4\), this optimizer keeps .* \(12, 5\)"),
        ({"history": 7}, r"history is .*\(4, 80\)"),
        ({"fisher": "none"}, "saved by another optimizer or with other settings"),
    ],
)
def test_state_of_other_settings_is_refused_by_name_and_changes_nothing(make_network, train, options: dict, message: str) -> None:
    network = make_network()
    optimizer = METHODS["natural galore"](network)
    train(network, optimizer, range(2))
    other_network = make_network()
    groups = low_rank_groups(other_network, rank=options.pop("rank", 4), update_proj_gap=3)
    other = NaturalGaLore(groups, lr=0.01, **({"history": 4} | options))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        other.load_state_dict(optimizer.state_dict())
    assert "up.weight" in str(error.value)
    assert str(other.state_dict()) == str(before)


@methods
@precisions
def test_state_bytes_equal_a_walk_over_all_tensors(make_network, method: str, dtype: torch.dtype, rounding: str) -> None:
    optimizer = METHODS[method](make_network(dtype), rounding=rounding)
    sizes = state_bytes(optimizer)
    walk = sum(t.untyped_storage().nbytes() for state in optimizer.state.values() for t in state.values())
    assert sizes["total"] == walk == sum(size for kind, size in sizes.items() if kind != "total")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_follow_the_formulas_of_the_page(dtype: torch.dtype) -> None:
    m, n, r, s, width = 96, 32, 8, 5, dtype.itemsize
    matrix = nn.Parameter(torch.zeros(m, n, dtype=dtype))
    a, b = min(m, n), max(m, n)
    sizes = state_bytes(NaturalGaLore([{"params": [matrix], "rank": r}], history=s, rounding="master"))
    assert sizes == {
        "basis": width * a * r,
        "moments": 4 * 2 * r * b,
        "fisher": width * s * r * b + 8 * s * s,
        "master": 0 if dtype == torch.float32 else 4 * m * n,
        "other": 3 * 8,
        "total": sum(size for kind, size in sizes.items() if kind != "total"),
    }


def test_a_group_added_later_gets_state_and_moves_no_refresh_of_the_others(make_network) -> None:
    network = make_network()
    optimizer = METHODS["natural galore"](network)
    due = [optimizer._refresh_is_due(p, True) for p in optimizer.param_groups[1]["params"]]
    extra = nn.Parameter(torch.randn(9, 30))
    optimizer.add_param_group({"params": [("extra", extra)], "rank": 2})
    assert optimizer.state[extra]["history"].shape == (4, 60)
    assert [optimizer._refresh_is_due(p, True) for p in optimizer.param_groups[1]["params"]] == due
    extra.grad = torch.randn(9, 30)
    optimizer.step()
    assert optimizer.state[extra]["refreshes"] == 1
