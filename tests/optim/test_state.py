"""Optimizer state: complete from the start, plain tensors, and exact through every way of saving it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups, state_bytes

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda model, **options: AdamW(model.named_parameters(), lr=0.01, **options),
    "galore": lambda model, **options: GaLore(low_rank_groups(model, rank=4, update_proj_gap=3), lr=0.01, **options),
    "galore reset": lambda model, **options: GaLore(
        low_rank_groups(model, rank=4, update_proj_gap=3), lr=0.01, on_refresh="reset", subspace="randomized", **options
    ),
    "natural galore": lambda model, **options: NaturalGaLore(
        low_rank_groups(model, rank=4, update_proj_gap=3), lr=0.01, fisher="history", history=4, **options
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


class NewStorages(TorchDispatchMode):
    """Bytes of every storage that operations make, other than those they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.bytes += sum(storage.nbytes() for storage in made if storage.data_ptr() not in given)
        return result


@methods
@precisions
def test_loading_allocates_nothing(make_network, train, method: str, dtype: torch.dtype, rounding: str) -> None:
    """Room for the state is there from the start; a second copy, even for a moment, can be what does not fit at resume."""
    network = make_network(dtype)
    optimizer = METHODS[method](network, rounding=rounding)
    train(network, optimizer, range(4))
    other = METHODS[method](make_network(dtype), rounding=rounding)
    addresses = [tensor.data_ptr() for state in other.state.values() for tensor in state.values()]
    saved = optimizer.state_dict()
    with NewStorages() as new:
        other.load_state_dict(saved)
    assert new.bytes == 0
    assert [tensor.data_ptr() for state in other.state.values() for tensor in state.values()] == addresses
    assert same_state(optimizer, other)


def test_the_counter_of_the_test_above_sees_torch_copy_the_state(make_network, train) -> None:
    network = make_network(torch.bfloat16)
    optimizer = METHODS["adamw"](network)
    with NewStorages() as new:
        torch.optim.Optimizer.load_state_dict(optimizer, optimizer.state_dict())
    assert new.bytes == 2 * 2 * sum(p.numel() for p in network.parameters())  # both moments, cast to bf16


def test_hooks_of_torch_see_what_is_loaded_and_may_change_it(make_network, train) -> None:
    network = make_network()
    optimizer = METHODS["natural galore"](network)
    train(network, optimizer, range(2))
    other = METHODS["natural galore"](make_network())
    seen: list[bool] = []

    def double(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {
            number: {key: 2 * value if key == "exp_avg" else value for key, value in tensors.items()}
            for number, tensors in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def look(loaded: torch.optim.Optimizer) -> None:
        pairs = zip(loaded.state.values(), optimizer.state.values(), strict=True)
        seen.append(all(torch.equal(mine["exp_avg"], 2 * theirs["exp_avg"]) for mine, theirs in pairs))

    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(look, prepend=True)
    for _ in range(2):
        seen.clear()
        other.load_state_dict(optimizer.state_dict())
        look(other)
        assert seen == [True, True]  # in the hook and at the end


def test_state_in_other_groups_is_refused_and_changes_nothing(make_network, train) -> None:
    network = make_network()
    optimizer = AdamW(network.named_parameters())
    train(network, optimizer, range(2))
    named = list(make_network().named_parameters())
    other = AdamW([{"params": named[:3]}, {"params": named[3:]}])
    for _ in range(2):  # also the second time: nothing of the first attempt stays behind
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="different number of parameter groups"):
            other.load_state_dict(optimizer.state_dict())
        assert str(other.state_dict()) == str(before)
    other.load_state_dict(before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by design: one process
@methods
def test_distributed_checkpoints_hold_the_exact_state(make_network, train, identical, tmp_path: Path, method: str) -> None:
    network = make_network(torch.bfloat16)
    optimizer = METHODS[method](network, rounding="master")
    train(network, optimizer, range(4))
    weights, state = get_state_dict(network, optimizer)
    dcp.save({"weights": weights, "optimizer": state}, checkpoint_id=tmp_path)
    room = make_network(torch.bfloat16)
    saved = dict(zip(("weights", "optimizer"), get_state_dict(room, METHODS[method](room, rounding="master")), strict=True))
    dcp.load(saved, checkpoint_id=tmp_path)
    resumed = make_network(torch.bfloat16)
    other = METHODS[method](resumed, rounding="master")
    set_state_dict(resumed, other, model_state_dict=saved["weights"], optim_state_dict=saved["optimizer"])
    assert same_state(optimizer, other)
    assert train(network, optimizer, range(4, 9)) == train(resumed, other, range(4, 9))
    assert identical(network, resumed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "history", "history": 4, "rank": 5}, r"basis is .* \(12, 4\), this optimizer keeps .* \(12, 5\)"),
        ({"fisher": "history", "history": 7}, r"history is .*\(4, 80\)"),
        ({"fisher": "none"}, "saved by another optimizer or with other settings"),
    ],
)
def test_state_of_other_settings_is_refused_by_name_and_changes_nothing(make_network, train, options: dict, message: str) -> None:
    network = make_network()
    optimizer = METHODS["natural galore"](network)
    train(network, optimizer, range(2))
    other_network = make_network()
    groups = low_rank_groups(other_network, rank=options.pop("rank", 4), update_proj_gap=3)
    other = NaturalGaLore(groups, lr=0.01, **options)
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
    sizes = state_bytes(NaturalGaLore([{"params": [matrix], "rank": r}], fisher="history", history=s, rounding="master"))
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
    due = [optimizer._refresh_is_due(p) for p in optimizer.param_groups[1]["params"]]
    extra = nn.Parameter(torch.randn(9, 30))
    optimizer.add_param_group({"params": [("extra", extra)], "rank": 2})
    assert optimizer.state[extra]["history"].shape == (4, 60)
    assert [optimizer._refresh_is_due(p) for p in optimizer.param_groups[1]["params"]] == due
    extra.grad = torch.randn(9, 30)
    optimizer.step()
    assert optimizer.state[extra]["refreshes"] == 1
