"""Per-layer updates: the same numbers as whole-gradient updates, one full gradient at a time, and nothing done that is then dropped."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups
from ngpt.optim.per_layer_hook import PerLayerUpdates, attach


def natural_galore(network: nn.Module, **options) -> NaturalGaLore:
    return NaturalGaLore(low_rank_groups(network, rank=4, update_proj_gap=3), lr=0.01, fisher="history", history=4, **options)


def fixed_basis(network: nn.Module) -> NaturalGaLore:
    """Each basis is chosen in the first update and stays."""
    return NaturalGaLore(low_rank_groups(network, rank=4, update_proj_gap=1000), lr=0.01, fisher="history", history=4, stagger=False)


METHODS: dict[str, Callable[..., AdamW]] = {
    "adamw": lambda network: AdamW(network.named_parameters(), lr=0.01),
    "galore": lambda network: GaLore(low_rank_groups(network, rank=4, update_proj_gap=3), lr=0.01),
    "natural galore": natural_galore,
}


def bits(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every number of weights and state, to be compared later."""
    tensors = [*network.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    return [tensor.detach().clone() for tensor in tensors]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply", ["deferred", "immediate"])
def test_equals_updates_from_whole_gradients(make_network, train, loss_of, identical, method: str, dtype: torch.dtype, apply: str) -> None:
    whole, layered = make_network(dtype), make_network(dtype)
    train(whole, METHODS[method](whole), range(8))
    updates = attach(METHODS[method](layered), apply=apply)
    for index in range(8):
        updates.begin_update(1)
        updates.begin_micro_batch()
        loss_of(layered, index).backward()
        assert all(p.grad is None for p in layered.parameters())
        updates.step()
    assert identical(whole, layered)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_equal_one_step_on_their_mean_gradient(make_network, loss_of, method: str) -> None:
    """The subspace of a refresh comes from the first micro-batch, so both are given the same bases: that of the first micro-batch."""
    count = 4
    whole, layered = make_network(torch.float64), make_network(torch.float64)
    optimizer = METHODS[method](whole)
    updates = attach(METHODS[method](layered), apply="deferred")
    for index in range(7):
        updates.begin_update(count)
        for part in range(count):
            rows = slice(8 * part, 8 * part + 8)
            updates.begin_micro_batch()
            (loss_of(layered, index, rows) / count).backward()
            (loss_of(whole, index, rows) / count).backward()
            if part == 0:
                for p in whole.parameters():
                    optimizer.reduce_gradient(p, p.grad)
        for p in whole.parameters():
            optimizer.apply_gradient(p, optimizer.reduce_gradient(p, p.grad, first=False))
            p.grad = None
        updates.step()
        for p, q in zip(whole.parameters(), layered.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-9, rtol=1e-9)


def test_several_bf16_micro_batches_are_added_up_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = AdamW([weight], weight_decay=0.0)
    updates = attach(optimizer)
    updates.begin_update(257)
    for number in range(1, 258):
        updates.begin_micro_batch()
        weight.sum().backward()
        assert updates.norm().item() == pytest.approx(2 * number)  # bf16 has no 257


# ----------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("apply", ["deferred", "immediate"])
def test_no_full_gradient_of_a_matrix_is_alive_when_the_next_is_born(apply: str) -> None:
    """Recorded when each gradient arrives: how many bytes of `.grad`, and how many of the tensors that ever were a gradient, are alive."""
    network = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(8)])
    largest = max(p.numel() * p.element_size() for p in network.parameters())
    optimizer = NaturalGaLore(low_rank_groups(network, rank=2), lr=0.01, fisher="history")
    born: list[weakref.ref] = []
    grad_bytes: list[int] = []
    alive: list[int] = []

    def record(p: Tensor) -> None:
        born.append(weakref.ref(p.grad))
        grads = [q.grad for q in network.parameters() if q.grad is not None]
        grad_bytes.append(sum(grad.numel() * grad.element_size() for grad in grads))
        alive.append(sum(reference() is not None for reference in born))

    for p in network.parameters():
        p.register_post_accumulate_grad_hook(record)  # before ours, so it sees each gradient
    updates = attach(optimizer, apply=apply)
    for _ in range(2):
        updates.begin_micro_batch()
        network(torch.randn(5, 32)).square().sum().backward()
        kept = 0 if apply == "immediate" else 8 * 2 * 32 * 4
        assert updates.live_bytes() == kept
        updates.step()
        assert updates.live_bytes() == 0
    assert len(born) == 16
    assert set(grad_bytes) == {largest}
    assert set(alive) == {1}


def test_the_counter_of_the_test_above_sees_plain_backward_keep_them_all() -> None:
    network = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(8)])
    alive: list[int] = []
    for p in network.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in network.parameters())))
    network(torch.randn(5, 32)).square().sum().backward()
    assert alive == list(range(1, 9))


# ------------------------------------------------------------------------------------------------------ norm and clipping
def test_norms_are_those_of_the_gradients(make_network, loss_of) -> None:
    network = make_network()
    reference = copy.deepcopy(network)
    loss_of(reference, 0).backward()
    true_norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in reference.parameters()]))
    optimizer = natural_galore(network)
    parts = []
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        parts.append(optimizer.reduce_gradient(p, q.grad).norm())
        optimizer.drop_gradient(p)
    for apply in ("deferred", "immediate"):
        twin = copy.deepcopy(network)
        updates = attach(natural_galore(twin), apply=apply)
        loss_of(twin, 0).backward()
        torch.testing.assert_close(updates.full_norm(), true_norm)
        torch.testing.assert_close(updates.norm(), torch.linalg.vector_norm(torch.stack(parts)))
        assert updates.norm() < updates.full_norm()


def test_the_full_norm_of_several_micro_batches_is_not_known(make_network, loss_of) -> None:
    network = make_network()
    updates = attach(natural_galore(network))
    updates.begin_update(2)
    for part in range(2):
        updates.begin_micro_batch()
        loss_of(network, part).backward()
    assert updates.full_norm() is None
    assert updates.norm() > 0


@pytest.mark.parametrize("read_before", [True, False])
def test_the_full_norm_stays_that_of_the_gradient_when_clipping_scales(make_network, loss_of, read_before: bool) -> None:
    twin = make_network(torch.float64)
    unscaled = attach(natural_galore(twin))
    loss_of(twin, 0).backward()
    network = make_network(torch.float64)
    updates = attach(natural_galore(network))
    loss_of(network, 0).backward()
    if read_before:
        assert (updates.norm(), updates.full_norm()) == (unscaled.norm(), unscaled.full_norm())
    updates.scale_(0.25)
    updates.scale_(0.5)
    torch.testing.assert_close(updates.norm(), unscaled.norm() / 8)
    torch.testing.assert_close(updates.full_norm(), unscaled.full_norm())


class CountedNorms(TorchDispatchMode):
    """Elements read by every operation that takes norms."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "norm" in func.overloadpacket.__name__ and "layer" not in func.overloadpacket.__name__:
            self.elements += sum(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("apply", "micro_batches"), [("deferred", 1), ("deferred", 3), ("immediate", 1)])
def test_norms_read_each_tensor_once(make_network, loss_of, apply: str, micro_batches: int) -> None:
    """Full gradients only where they existed as a whole and are not what is kept; the kept ones when asked for, however often."""
    network = make_network()
    optimizer = fixed_basis(network)
    plain, matrices = (group["params"] for group in optimizer.param_groups)
    kept = sum(p.numel() for p in plain) + sum(4 * max(p.shape) for p in matrices)
    full = sum(p.numel() for p in matrices) if micro_batches == 1 else 0
    updates = attach(optimizer, apply=apply)
    loss_of(network, 0).backward()  # choosing the basis also takes a norm
    updates.step()
    with CountedNorms() as read:
        updates.begin_update(micro_batches)
        for _ in range(micro_batches):
            updates.begin_micro_batch()
            loss_of(network, 1).backward()
        during_backward = read.elements
        for _ in range(3):
            updates.norm()
            updates.full_norm()
    of_each = 3 * (len(plain) + len(matrices)) * (2 if micro_batches == 1 else 1)  # the root over all parameters, when asked for
    assert during_backward == full + (kept if apply == "immediate" else 0)
    assert read.elements == kept + full + of_each


def test_an_update_without_gradients_has_norms_on_the_device_of_the_parameters() -> None:
    weight = nn.Parameter(torch.zeros(3, 4, device="meta"))
    for apply in ("deferred", "immediate"):
        updates = attach(AdamW([weight]), apply=apply)
        updates.begin_update(1)
        for value in (updates.norm(), updates.full_norm(), updates.skipped_in_update()):
            assert (value.device.type, value.shape) == ("meta", ())
        updates.discard()
        updates.detach()


def test_clipping_does_not_depend_on_the_size_of_micro_batches(make_network, loss_of) -> None:
    """The applied norm exists for any number of micro-batches; the full norm, which would clip more, only where there is one."""
    networks = [make_network(torch.float64) for _ in range(2)]
    handles = [attach(fixed_basis(network)) for network in networks]
    for index in range(5):
        norms = []
        # The first update, which chooses the basis, has one micro-batch in both.
        for network, updates, count in zip(networks, handles, (1, 4 if index else 1), strict=True):
            updates.begin_update(count)
            for part in range(count):
                rows = 32 // count
                updates.begin_micro_batch()
                (loss_of(network, index, slice(rows * part, rows * part + rows)) / count).backward()
            norms.append(float(updates.norm()))
            assert norms[-1] > 0.1
            updates.scale_(0.1 / norms[-1])
            updates.step()
        assert norms[0] == pytest.approx(norms[1])
        for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)  # the factor comes from fp32 norms


def test_clipping_scales_what_is_applied(make_network, loss_of, identical) -> None:
    clipped, scaled = make_network(torch.float64), make_network(torch.float64)
    updates = attach(natural_galore(clipped))
    optimizer = natural_galore(scaled)
    for index in range(5):
        updates.begin_update(1)
        loss_of(clipped, index).backward()
        factor = float(0.1 / updates.norm())
        updates.scale_(factor)
        torch.testing.assert_close(updates.norm(), torch.tensor(0.1))
        updates.step()
        loss_of(scaled, index).backward()
        for p in scaled.parameters():
            optimizer.apply_gradient(p, factor * optimizer.reduce_gradient(p, p.grad))
            p.grad = None
        for p, q in zip(clipped.parameters(), scaled.parameters(), strict=True):
            torch.testing.assert_close(p, q)


# ------------------------------------------------------------------------------------------------------------- bad values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("updates_before", [0, 1, 2, 3])
def test_a_discarded_update_leaves_every_bit(make_network, loss_of, identical, dtype: torch.dtype, bad: float, updates_before: int) -> None:
    """An update with NaN or Inf in a gradient is discarded | weights and state keep every bit"""
    network, undisturbed = make_network(dtype), make_network(dtype)
    handles: list[tuple[nn.Module, NaturalGaLore, PerLayerUpdates]] = []
    for one in (network, undisturbed):
        optimizer = natural_galore(one, stagger=False)
        handles.append((one, optimizer, attach(optimizer)))

    def update(one: nn.Module, updates: PerLayerUpdates, index: int) -> None:
        updates.begin_update(1)
        loss_of(one, index).backward()
        updates.step()

    for index in range(updates_before):
        for one, _, updates in handles:
            update(one, updates, index)
    network, optimizer, updates = handles[0]
    before = bits(network, optimizer)
    for factors in ((bad, 1.0), (1.0, bad)):
        updates.begin_update(2)
        for part, factor in enumerate(factors):
            updates.begin_micro_batch()
            (loss_of(network, 50 + part) * factor).backward()
        assert not updates.norm().isfinite()
        updates.discard()
        assert same_bits(before, bits(network, optimizer))
    for index in range(updates_before, updates_before + 4):
        for one, _, other in handles:
            update(one, other, index)
    assert identical(network, undisturbed)
    assert same_bits(bits(network, optimizer), bits(undisturbed, handles[1][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_immediate_mode_skips_only_the_matrix_whose_gradient_is_not_finite(make_network, loss_of, dtype: torch.dtype, bad: float) -> None:
    """NaN or Inf in the gradient of one matrix, apply=immediate | that matrix is left out, and counted"""
    network = make_network(dtype)
    optimizer = natural_galore(network)
    updates = attach(optimizer, apply="immediate")
    for index in range(2):
        loss_of(network, index).backward()
        updates.step()
    poisoned = network.square.weight
    poison = poisoned.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), bad))
    before = {p: [p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())] for p in network.parameters()}
    loss_of(network, 2).backward()
    assert not updates.norm().isfinite()
    updates.discard()
    poison.remove()
    counters = ("step", "refreshes", "cleared_at")
    for p in network.parameters():
        values = [p.detach(), *(t for key, t in optimizer.state[p].items() if key not in counters)]
        old = [before[p][0], *(t for key, t in zip(optimizer.state[p], before[p][1:], strict=True) if key not in counters)]
        assert same_bits(values, old) == (p is poisoned)
        assert all(value.isfinite().all() for value in values)
    assert updates.skipped_updates() == 1
    loss_of(network, 3).backward()
    updates.step()
    assert updates.skipped_updates() == 1
    assert not torch.equal(poisoned, before[poisoned][0])


def test_skipped_layers_are_counted_on_the_device_without_growth(make_network, loss_of) -> None:
    network = make_network()
    updates = attach(natural_galore(network), apply="immediate")

    def train(index: int, poisoned: tuple[nn.Module, ...]) -> int:
        updates.begin_update(1)
        poison = [module.weight.register_hook(lambda grad: grad * float("nan")) for module in poisoned]
        loss_of(network, index).backward()
        for handle in poison:
            handle.remove()
        skipped = updates.skipped_in_update()
        assert (skipped.dtype, skipped.shape) == (torch.int64, ())
        updates.step()
        assert torch.equal(updates.skipped_in_update(), skipped)
        return int(skipped)

    def tensors_alive() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    assert [train(0, ()), train(1, (network.square, network.down)), train(2, ()), train(3, (network.up,))] == [0, 2, 0, 1]
    before = tensors_alive()
    for index in range(4, 8):
        assert train(index, ()) == 0
    assert tensors_alive() == before
    updates.begin_update(1)
    assert int(updates.skipped_in_update()) == 0
    assert updates.skipped_updates() == 3


# ----------------------------------------------------------------------------------------------------------------- misuse
def test_a_gradient_that_arrives_twice_in_one_micro_batch_is_an_error() -> None:
    """A shared block under reentrant checkpointing | refused: a gradient came twice"""
    block = nn.Linear(4, 4)
    updates = attach(AdamW(block.named_parameters()))
    hidden = torch.randn(2, 4, requires_grad=True)
    for _ in range(2):
        hidden = checkpoint(block, hidden, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"(weight|bias): a second gradient in one micro-batch.*use_reentrant=False"):
        hidden.sum().backward()
    updates.discard()


def test_a_shared_block_without_reentrant_checkpoints_is_fine() -> None:
    block = nn.Linear(4, 4)
    updates = attach(AdamW(block.named_parameters()))
    hidden = torch.randn(2, 4, requires_grad=True)
    for _ in range(2):
        hidden = checkpoint(block, hidden, use_reentrant=False)
    hidden.sum().backward()
    updates.step()


def test_misuse_is_refused_with_what_to_do(make_network, loss_of) -> None:
    network = make_network()
    optimizer = natural_galore(network)
    with pytest.raises(ValueError, match="apply = 'later', but it must be one of deferred, immediate"):
        attach(optimizer, apply="later")
    loss_of(network, 0).backward()
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight.*holds a gradient already; call zero_grad"):
        attach(optimizer)
    optimizer.zero_grad()
    immediate = attach(optimizer, apply="immediate")
    with pytest.raises(RuntimeError, match="2 micro-batches would be as many updates; use apply='deferred'"):
        immediate.begin_update(2)
    with pytest.raises(RuntimeError, match="cannot be scaled; use apply='deferred'"):
        immediate.scale_(0.5)
    immediate.detach()
    deferred = attach(optimizer)
    loss_of(network, 0).backward()
    with pytest.raises(RuntimeError, match=r"neither applied with step\(\) nor dropped with discard\(\)"):
        deferred.begin_update(1)
    deferred.discard()
    attach(optimizer)
    with pytest.raises(RuntimeError, match=r"another hook took its gradient first; detach\(\) what was attached before"):
        loss_of(network, 0).backward()


def test_detached_hooks_leave_gradients_where_they_belong(make_network, loss_of) -> None:
    network = make_network()
    updates = attach(natural_galore(network))
    loss_of(network, 0).backward()
    updates.detach()
    assert updates.live_bytes() == 0
    loss_of(network, 0).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_schedulers_of_torch_see_the_updates(make_network, loss_of, recwarn: pytest.WarningsRecorder) -> None:
    network = make_network()
    optimizer = natural_galore(network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    updates = attach(optimizer)
    for index in range(2):
        loss_of(network, index).backward()
        updates.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.0025]
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
