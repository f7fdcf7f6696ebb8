"""ReLoRA: what a merge does to weights, adapters, moments and rate, that it changes no function, and that saving keeps all of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ngpt.optim import AdamW, state_bytes
from ngpt.optim.per_layer_hook import attach
from ngpt.optim.relora import ReLoRA, prune_moments_

SCALE, MERGE_EVERY = 0.5, 3
PRECISIONS = [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "nearest"), (torch.bfloat16, "master")]
precisions = pytest.mark.parametrize(("dtype", "rounding"), PRECISIONS)


class Adapted(nn.Module):
    """An embedding, two frozen matrices with adapters of rank 3, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 12)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(20, 12) / 4, requires_grad=False) for _ in range(2))
        self.downs = nn.ParameterList(nn.Parameter(torch.randn(3, 12) / 4) for _ in range(2))
        self.ups = nn.ParameterList(nn.Parameter(torch.zeros(20, 3)) for _ in range(2))
        self.lm_head = nn.Linear(20, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        first, second = (
            F.linear(hidden, w) + F.linear(F.linear(hidden, a) * SCALE, b)
            for w, a, b in zip(self.weights, self.downs, self.ups, strict=True)
        )
        return self.lm_head(torch.tanh(first) * second)

    def adapters(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(self.weights, self.downs, self.ups, strict=True))

    def trainable(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]


def network_of(dtype: torch.dtype = torch.float32) -> Adapted:
    torch.manual_seed(7)
    return Adapted().to(dtype)


def relora(network: Adapted, **options: Any) -> ReLoRA:
    settings = {"lr": 0.01, "adapters": network.adapters(), "scale": SCALE, "merge_every": MERGE_EVERY, "restart_warmup": 2}
    return ReLoRA(network.trainable(), **(settings | options))


def adamw(network: Adapted, **options: Any) -> AdamW:
    return AdamW(network.trainable(), lr=0.01, weight_decay=0.0, **options)


# -------------------------------------------------------------------------------------------------------------- a merge
def test_before_the_first_merge_it_is_adamw_and_the_frozen_weights_do_not_move(train, identical):
    ours, theirs = network_of(), network_of()
    before = [weight.clone() for weight in ours.weights]
    train(ours, relora(ours), range(MERGE_EVERY - 1))
    train(theirs, adamw(theirs), range(MERGE_EVERY - 1))
    assert identical(ours, theirs)
    assert all(torch.equal(old, new) for old, new in zip(before, ours.weights, strict=True))
    assert all(up.any() for up in ours.ups)


@precisions
def test_a_merge_adds_the_scaled_product_and_starts_the_adapters_anew(train, dtype, rounding):
    ours, theirs = network_of(dtype), network_of(dtype)
    optimizer, reference = relora(ours, rounding=rounding), adamw(theirs, rounding=rounding)
    train(ours, optimizer, range(MERGE_EVERY))
    train(theirs, reference, range(MERGE_EVERY))
    for (weight, down, up), (old_weight, old_down, old_up) in zip(ours.adapters(), theirs.adapters(), strict=True):
        exact_down, exact_up = (reference.state[p].get("master", p).double() for p in (old_down, old_up))
        exact = old_weight.double() + SCALE * exact_up @ exact_down
        if rounding == "stochastic":
            assert ((weight.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-12).all()  # the bf16 number above or below
            assert not torch.equal(weight, exact.to(dtype))
        else:
            torch.testing.assert_close(weight, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-7)
        assert not torch.equal(weight, old_weight)
        assert not up.any()
        assert not torch.equal(down, old_down)
        assert down.abs().max() <= 12**-0.5
        assert down.abs().max() > 0.8 * 12**-0.5
        for p in (down, up):
            if rounding == "master":
                assert torch.equal(optimizer.state[p]["master"].to(dtype), p)
    assert not torch.equal(ours.downs[0], ours.downs[1])


def test_a_merge_does_not_change_the_function(train):
    ours, theirs = network_of(), network_of()
    train(ours, relora(ours), range(MERGE_EVERY))
    train(theirs, adamw(theirs), range(MERGE_EVERY))
    tokens = torch.arange(13)
    torch.testing.assert_close(ours(tokens), theirs(tokens))
    assert not torch.equal(ours.weights[0], theirs.weights[0])


def test_new_adapters_depend_on_seed_and_merge(train):
    def downs(seed: int, steps: int) -> Tensor:
        network = network_of()
        train(network, relora(network, seed=seed, lr=0.0), range(steps))
        return network.downs[0].clone()

    assert torch.equal(downs(0, MERGE_EVERY), downs(0, MERGE_EVERY))
    assert not torch.equal(downs(0, MERGE_EVERY), downs(1, MERGE_EVERY))
    assert not torch.equal(downs(0, MERGE_EVERY), downs(0, 2 * MERGE_EVERY))


def test_further_steps_without_a_gradient_merge_nothing(train, identical):
    network = network_of()
    optimizer = relora(network, prune=0.5)
    train(network, optimizer, range(MERGE_EVERY))
    before, its_optimizer = copy.deepcopy((network, optimizer))
    optimizer.zero_grad()
    optimizer.step()
    assert identical(network, before)
    assert all(
        torch.equal(tensor, old[key])
        for state, old in zip(optimizer.state.values(), its_optimizer.state.values(), strict=True)
        for key, tensor in state.items()
    )


# -------------------------------------------------------------------------------------------------------------- moments
@pytest.mark.parametrize(("share", "left"), [(0.0, 60), (0.5, 30), (0.9, 6), (1.0, 0)])
def test_the_smallest_moments_are_pruned_both_of_an_element_together(share, left):
    torch.manual_seed(0)
    first, second = torch.randn(20, 3), torch.rand(20, 3) + 1
    magnitude = first.abs()
    prune_moments_(first, second, share)
    assert (first != 0).sum() == (second != 0).sum() == left
    assert torch.equal(first != 0, second != 0)
    if 0 < left < 60:
        assert magnitude[first != 0].min() > magnitude[first == 0].max()


@pytest.mark.parametrize("prune", [0.0, 0.9, 1.0])
def test_only_the_adapters_moments_are_pruned_and_training_goes_on_calmly(train, prune):
    network, twin = network_of(), network_of()
    optimizer, reference = relora(network, prune=prune), adamw(twin)
    train(network, optimizer, range(MERGE_EVERY))
    train(twin, reference, range(MERGE_EVERY))
    embedding, up = network.embed_tokens.weight, network.ups[0]
    assert torch.equal(optimizer.state[embedding]["exp_avg"], reference.state[twin.embed_tokens.weight]["exp_avg"])
    assert optimizer.state[up]["exp_avg"].count_nonzero() == round((1 - prune) * up.numel())
    before = [p.clone() for _, p in network.trainable()]
    train(network, optimizer, range(MERGE_EVERY, MERGE_EVERY + 1))
    largest = max((p - old).abs().max().item() for (_, p), old in zip(network.trainable(), before, strict=True))
    assert largest < 5 * 0.01  # a few times the rate; the gradient of A was exactly zero here


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_moments_in_fewer_bits_are_pruned_too_and_saved(train, identical, state_dtype):
    network = network_of()
    optimizer = relora(network, state_dtype=state_dtype, prune=0.9)
    train(network, optimizer, range(MERGE_EVERY - 1))
    before = copy.deepcopy((network, optimizer))
    train(network, optimizer, range(MERGE_EVERY - 1, MERGE_EVERY))
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[network.ups[0]][key].count_nonzero() == 6
    twin = network_of()
    twin.load_state_dict(before[0].state_dict())
    resumed = relora(twin, state_dtype=state_dtype, prune=0.9)
    resumed.load_state_dict(before[1].state_dict())
    train(twin, resumed, range(MERGE_EVERY - 1, 8))
    train(network, optimizer, range(MERGE_EVERY, 8))
    assert identical(network, twin)


# ----------------------------------------------------------------------------------------------------------------- rate
def test_the_rate_of_all_parameters_climbs_again_after_each_merge(train):
    network = network_of()
    optimizer = relora(network, merge_every=5, restart_warmup=4, betas=(0.0, 0.0), eps=1e-12, lr=0.01)
    steps = []
    for index in range(12):
        before = network.lm_head.bias.detach().clone()
        train(network, optimizer, range(index, index + 1))
        steps.append((network.lm_head.bias - before).abs().max().item() / 0.01)  # without memory, Adam's step is the rate
    assert steps == pytest.approx([1] * 5 + [0.25, 0.5, 0.75, 1, 1] + [0.25, 0.5], rel=1e-4)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


# ------------------------------------------------------------------------------------------------------------ exactness
@precisions
@pytest.mark.parametrize("steps_before", range(1, 8))
def test_a_saved_run_continues_bit_for_bit_across_merges(train, identical, dtype, rounding, steps_before):
    straight = network_of(dtype)
    train(straight, relora(straight, rounding=rounding), range(8))
    network = network_of(dtype)
    optimizer = relora(network, rounding=rounding)
    train(network, optimizer, range(steps_before))
    file = io.BytesIO()
    torch.save({"weights": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network_of(dtype)
    resumed.load_state_dict(saved["weights"])
    again = relora(resumed, rounding=rounding)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, range(steps_before, 8))
    assert identical(resumed, straight)


def test_a_copy_goes_on_by_itself_with_its_own_weights(train, identical):
    network = network_of()
    optimizer = relora(network)
    train(network, optimizer, range(2))
    twin, its_optimizer = copy.deepcopy((network, optimizer))
    train(twin, its_optimizer, range(2, 8))
    assert torch.equal(network.weights[0], network_of().weights[0])
    train(network, optimizer, range(2, 8))
    assert identical(network, twin)


@precisions
@pytest.mark.parametrize("apply", ["deferred", "immediate"])
def test_per_layer_updates_merge_as_whole_ones_do(train, loss_of: Callable[..., Tensor], identical, dtype, rounding, apply):
    whole, layered = network_of(dtype), network_of(dtype)
    train(whole, relora(whole, rounding=rounding), range(8))
    updates = attach(relora(layered, rounding=rounding), apply=apply)
    for index in range(8):
        updates.begin_update(1)
        updates.begin_micro_batch()
        loss_of(layered, index).backward()
        updates.step()
    assert identical(layered, whole)


def test_a_discarded_update_does_not_count_and_merges_nothing(train, loss_of: Callable[..., Tensor], identical):
    straight, network = network_of(), network_of()
    train(straight, relora(straight), range(4))
    updates = attach(relora(network))
    for index in (0, 1, None, 2, 3):
        loss_of(network, 9 if index is None else index).backward()
        if index is None:
            updates.discard()
        else:
            updates.step()
    assert identical(network, straight)


def test_immediate_updates_leave_out_what_is_not_finite_and_still_merge(train):
    network = network_of()
    optimizer = relora(network)
    train(network, optimizer, range(MERGE_EVERY - 1))
    weight, down, up = (p.detach().clone() for p in network.adapters()[0])
    for _, p in network.trainable():
        broken = p is network.downs[0] or p is network.ups[0]
        finite = optimizer.apply_gradient(p, torch.full_like(p, float("nan") if broken else 0.0), guard=True)
        assert finite is not None
        assert bool(finite) is not broken
    assert torch.equal(network.downs[0], down)
    assert torch.equal(network.ups[0], up)
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(network.weights[0], weight + SCALE * up @ down)
    assert not network.ups[0].any()


# ---------------------------------------------------------------------------------------------------------------- state
def test_frozen_weights_have_no_state_and_no_gradient(train):
    network = network_of(torch.bfloat16)
    optimizer = relora(network, rounding="master")
    train(network, optimizer, range(MERGE_EVERY))
    assert all(weight.grad is None and weight not in optimizer.state for weight in network.weights)
    trained = sum(p.numel() for _, p in network.trainable())
    count = len(network.trainable())
    assert state_bytes(optimizer) == {
        "basis": 0,
        "moments": 8 * trained,
        "fisher": 0,
        "master": 4 * trained,
        "other": 16 * count,
        "total": 12 * trained + 16 * count,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_every": 0}, "merge_every = 0, but it must be an integer >= 1"),
        ({"restart_warmup": 3}, "restart_warmup = 3, but it must be at least 0 and below merge_every = 3"),
        ({"prune": 1.5}, "prune = 1.5, but it must be a share"),
        ({"scale": 0.0}, "scale = 0.0, but it must be a finite number > 0"),
        ({"scale": float("nan")}, "scale = nan"),
        ({"adapters": []}, "adapters is empty"),
        ({"lr": -1.0}, "lr = -1.0"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        relora(network_of(), **options)


def test_adapters_that_do_not_fit_are_named():
    network = network_of()
    (weight, down, up), other = network.adapters()
    with pytest.raises(ValueError, match=r"adapter 1: W, A, B have shapes .* but they must be \(m, n\), \(r, n\), \(m, r\)"):
        relora(network, adapters=[other, (weight, up, down)])
    with pytest.raises(ValueError, match="adapter 0: A and B must be parameters of the optimizer"):
        relora(network, adapters=[(weight, down.detach().clone(), up)])
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match="adapter 0: W must be frozen"):
        relora(network, adapters=[(weight, down, up)])
