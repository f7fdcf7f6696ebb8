"""State of every method, with moments of every width: complete from the start, and exact through saving between any two updates."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ngpt.optim import factored_fisher, low_rank, low_rank_groups, state_bytes

UPDATES = 8
state_dtypes = pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "8bit"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every number of weights and state, to be compared later."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [tensor.detach().clone() for p in params for tensor in (p, *optimizer.state[p].values())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def copy_weights(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for group, other in zip(source.param_groups, target.param_groups, strict=True):
            for p, q in zip(group["params"], other["params"], strict=True):
                q.copy_(p)


@pytest.fixture
def everything_happens_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight updates: refreshes (every third update, each matrix at its turn), roots of the factored Fisher, a look at convergence."""
    monkeypatch.setattr(factored_fisher, "ROOT_INTERVAL", 5)
    monkeypatch.setattr(low_rank, "CONVERGENCE_INTERVAL", 4)


@pytest.mark.usefixtures("everything_happens_soon")
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, "fp32"), (torch.float32, "8bit"), (torch.bfloat16, "fp32"), (torch.bfloat16, "bf16"), (torch.bfloat16, "8bit")],
    ids=str,
)
def test_a_file_saved_between_any_two_updates_continues_bit_for_bit(
    make, groups_of, give_gradients, dtype: torch.dtype, state_dtype: str
) -> None:
    optimizer = make(groups_of(dtype), state_dtype=state_dtype)
    for index in range(UPDATES):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = make(groups_of(dtype), state_dtype=state_dtype)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        copy_weights(optimizer, resumed)
        for one in (optimizer, resumed):
            give_gradients(one, index)
            one.step()
        assert same(everything(optimizer), everything(resumed)), f"update {index}"
    assert all(tensor.isfinite().all() for tensor in everything(optimizer))


@pytest.mark.usefixtures("everything_happens_soon")
def test_the_updates_of_the_test_above_change_the_rank_both_ways(make, groups_of, give_gradients) -> None:
    optimizer = make(groups_of())
    matrices = optimizer.param_groups[1]["params"]
    if "rank" not in optimizer.state[matrices[0]]:
        return
    ranks = []
    for index in range(UPDATES):
        give_gradients(optimizer, index)
        optimizer.step()
        ranks.append([int(optimizer.state[p]["rank"]) for p in matrices])
    of_each = zip(*ranks, strict=True)
    changes = {later > earlier for one in of_each for earlier, later in itertools.pairwise(one) if earlier != later}
    assert changes == {True, False}


@state_dtypes
def test_all_state_is_there_from_the_start_and_stays_where_it_is(make, groups_of, give_gradients, state_dtype: str) -> None:
    def places(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
        states = optimizer.state.values()
        return [(key, value.data_ptr(), value.shape, value.dtype) for state in states for key, value in state.items()]

    optimizer = make(groups_of(torch.bfloat16), state_dtype=state_dtype, rounding="master")
    before = places(optimizer)
    for index in range(4):
        give_gradients(optimizer, index)
        optimizer.step()
    assert places(optimizer) == before


@dtypes
@state_dtypes
def test_state_bytes_equal_a_walk_over_all_tensors(make, groups_of, state_dtype: str, dtype: torch.dtype) -> None:
    optimizer = make(groups_of(dtype), state_dtype=state_dtype)
    sizes = state_bytes(optimizer)
    walk = sum(t.untyped_storage().nbytes() for state in optimizer.state.values() for t in state.values())
    assert sizes["total"] == walk == sum(size for kind, size in sizes.items() if kind != "total")
    counters = sum(8 for state in optimizer.state.values() for t in state.values() if t.dtype == torch.int64)
    norms = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim == 0 and t.dtype != torch.int64)
    assert sizes["other"] == counters + norms


def test_moments_of_fewer_bits_take_fewer_bytes(make, groups_of) -> None:
    """fp32: 4 each; bf16: 2; 8 bits: 1, and 4 for each block of at most 256 values of a tensor. (The factors of Adafactor stay fp32.)"""
    optimizers = {dtype: make(groups_of(), state_dtype=dtype) for dtype in ("fp32", "bf16", "8bit")}
    states = optimizers["fp32"].state.values()
    stored = [state[key].numel() for state in states for key in ("exp_avg", "exp_avg_sq") if key in state]
    factors = 4 * sum(state[key].numel() for state in states for key in ("exp_avg_sq_row", "exp_avg_sq_col") if key in state)
    values, blocks = sum(stored), sum(-(-numel // 256) for numel in stored)
    expected = {"fp32": 4 * values + factors, "bf16": 2 * values + factors, "8bit": values + 4 * blocks + factors}
    assert {dtype: state_bytes(optimizer)["moments"] for dtype, optimizer in optimizers.items()} == expected


@pytest.mark.parametrize("way", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_bit_for_bit(make, groups_of, give_gradients, way: Callable[[Any], Any]) -> None:
    optimizer = make(groups_of(torch.bfloat16), state_dtype="8bit")
    for index in range(4):
        give_gradients(optimizer, index)
        optimizer.step()
    twin = way(optimizer)
    for index in range(4, 8):
        for one in (optimizer, twin):
            give_gradients(one, index)
            one.step()
        assert same(everything(optimizer), everything(twin))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by design: one process
def test_state_dicts_of_distributed_checkpoint_are_exact_and_getting_one_changes_nothing(make, make_network, train) -> None:
    dtype = torch.bfloat16
    network = make_network(dtype)
    optimizer = make(low_rank_groups(network, rank=4, update_proj_gap=3), state_dtype="bf16")
    untouched = everything(optimizer)
    get_optimizer_state_dict(network, optimizer)
    assert same(everything(optimizer), untouched)
    train(network, optimizer, range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(network, optimizer))
    resumed = make_network(dtype)
    resumed.load_state_dict(network.state_dict())
    other = make(low_rank_groups(resumed, rank=4, update_proj_gap=3), state_dtype="bf16")
    set_optimizer_state_dict(resumed, other, saved)
    assert same(everything(optimizer), everything(other))
    assert train(network, optimizer, range(4, 8)) == train(resumed, other, range(4, 8))
    assert same(everything(optimizer), everything(other))


def test_an_update_with_zero_gradients_and_rate_before_loading_is_harmless(make, groups_of, give_gradients) -> None:
    """It is how torch.distributed.checkpoint, and others after it, make an optimizer allocate its state."""
    optimizer = make(groups_of(), weight_decay=0.1)
    for index in range(4):
        give_gradients(optimizer, index)
        optimizer.step()
    other = make(groups_of(), weight_decay=0.1)
    before = [p.detach().clone() for group in other.param_groups for p in group["params"]]
    rates = [group["lr"] for group in other.param_groups]
    for group in other.param_groups:
        group["lr"] = torch.tensor(0.0)
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    other.step()
    assert same(before, [p.detach() for group in other.param_groups for p in group["params"]])
    for group, rate in zip(other.param_groups, rates, strict=True):
        group["lr"] = rate
    copy_weights(optimizer, other)
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other):
        give_gradients(one, 4)
        one.step()
    assert same(everything(optimizer), everything(other))


# -------------------------------------------------------------------------------------------- what goes with optimizers in torch
def test_a_grad_scaler_skips_an_infinite_update_and_changes_no_other(make, make_network, loss_of) -> None:
    """The scale is a power of two, so that scaling and unscaling cost no digit."""
    scaled, plain = make_network(), make_network()
    optimizers = [make(low_rank_groups(network, rank=4, update_proj_gap=3)) for network in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for index in range(5):
        optimizers[0].zero_grad()
        loss = scaler.scale(loss_of(scaled, index))
        (loss * float("inf") if index == 2 else loss).backward()
        before = everything(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        if index == 2:
            assert scaler.get_scale() == 512.0
            assert same(everything(optimizers[0]), before)
            continue
        optimizers[1].zero_grad()
        loss_of(plain, index).backward()
        optimizers[1].step()
        assert same(everything(optimizers[0]), everything(optimizers[1]))


def test_a_closure_and_a_scheduler_give_the_numbers_of_a_step_with_the_rate_of_the_moment(make, make_network, loss_of) -> None:
    networks = [make_network(), make_network()]
    optimizers = [make(low_rank_groups(network, rank=4, update_proj_gap=3)) for network in networks]
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 0.02, total_steps=6, cycle_momentum=False),
        torch.optim.lr_scheduler.OneCycleLR(optimizers[1], 0.02, total_steps=6, cycle_momentum=False),
    ]
    for index in range(5):

        def closure(network: nn.Module = networks[0], index: int = index) -> Tensor:
            optimizers[0].zero_grad()
            loss = loss_of(network, index)
            loss.backward()
            return loss

        returned = optimizers[0].step(closure)
        optimizers[1].zero_grad()
        loss = loss_of(networks[1], index)
        loss.backward()
        assert returned == loss
        for group in optimizers[1].param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)  # a tensor is as good as a number
        optimizers[1].step()
        for group in optimizers[1].param_groups:
            group["lr"] = float(group["lr"])
        for scheduler in schedulers:
            scheduler.step()
    assert same(everything(optimizers[0]), everything(optimizers[1]))


def test_a_group_added_during_a_run_trains_and_is_saved(make, groups_of, give_gradients) -> None:
    def grown(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        extra = {key: value for key, value in optimizer.param_groups[1].items() if key in ("rank", "update_proj_gap", "scale")}
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(11, 7))], **extra})
        return optimizer

    optimizer = make(groups_of())
    for index in range(2):
        give_gradients(optimizer, index)
        optimizer.step()
    grown(optimizer)
    for index in range(2, 6):
        other = grown(make(groups_of()))
        other.load_state_dict(optimizer.state_dict())
        copy_weights(optimizer, other)
        for one in (optimizer, other):
            give_gradients(one, index)
            one.step()
        assert same(everything(optimizer), everything(other))
    assert not torch.equal(optimizer.param_groups[2]["params"][0].detach(), torch.ones(11, 7))
