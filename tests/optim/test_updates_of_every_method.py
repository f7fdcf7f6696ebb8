"""Every method: the two phases, per-layer updates, guarded skips, and what becomes of zero, non-finite, strided and bf16 gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ngpt.optim import AdamW, NaturalGaLore, low_rank_groups, storage
from ngpt.optim.adamw import COUNTERS
from ngpt.optim.factored_fisher import ROOT_INTERVAL
from ngpt.optim.hyper_parameters import FISHERS
from ngpt.optim.per_layer_hook import attach

BAD = (float("nan"), float("inf"), float("-inf"))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def parameters(optimizer: AdamW) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def bits(optimizer: AdamW, p: Tensor, without: frozenset[str] = frozenset()) -> list[Tensor]:
    return [p.detach().clone(), *(t.clone() for key, t in optimizer.state[p].items() if key not in without)]


def all_bits(optimizer: AdamW) -> list[Tensor]:
    return [tensor for p in parameters(optimizer) for tensor in bits(optimizer, p)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def run(optimizer: AdamW, give_gradients: Callable[..., None], indices: range) -> None:
    for index in indices:
        give_gradients(optimizer, index)
        optimizer.step()


# -------------------------------------------------------------------------------------------------------------- per layer
@pytest.mark.parametrize(("apply", "dtype"), [("deferred", torch.bfloat16), ("immediate", torch.float32)], ids=str)
def test_per_layer_updates_equal_updates_from_whole_gradients(make, make_network, train, loss_of, apply: str, dtype: torch.dtype) -> None:
    whole, layered = make_network(dtype), make_network(dtype)
    optimizers = [make(low_rank_groups(network, rank=4, update_proj_gap=3), state_dtype="8bit") for network in (whole, layered)]
    train(whole, optimizers[0], range(4))
    updates = attach(optimizers[1], apply=apply)
    for index in range(4):
        updates.begin_update(1)
        updates.begin_micro_batch()
        loss_of(layered, index).backward()
        updates.step()
    assert same(all_bits(optimizers[0]), all_bits(optimizers[1]))


def test_micro_batches_equal_one_step_on_their_sum_in_every_space(make, make_network, loss_of) -> None:
    """A subspace comes from the first micro-batch where gradients are kept projected, so the reference is given that basis."""
    count = 4
    whole, layered = make_network(torch.float64), make_network(torch.float64)
    optimizer, other = (make(low_rank_groups(network, rank=4, update_proj_gap=3)) for network in (whole, layered))
    updates = attach(other)
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
            torch.testing.assert_close(p, q, atol=1e-8, rtol=1e-8)


def test_a_first_micro_batch_without_gradient_adds_nothing(make, groups_of) -> None:
    """It chooses no basis, nor a rank; the second one does."""
    low_rank_gradient = torch.outer(torch.arange(1.0, 13.0), torch.ones(12))
    for stagger in (True, False):
        optimizer = make(groups_of(), **({"stagger": stagger} if make.is_low_rank else {}))
        updates = attach(optimizer)
        before = [p.detach().clone() for p in parameters(optimizer)]
        updates.begin_update(2)
        for factor in (0.0, 1.0):
            updates.begin_micro_batch()
            grads = [low_rank_gradient[: p.shape[0], : p.shape[-1]] if p.ndim == 2 else torch.ones_like(p) for p in parameters(optimizer)]
            sum((factor * grad * p).sum() for grad, p in zip(grads, parameters(optimizer), strict=True)).backward()
        updates.step()
        updates.detach()
        assert not any(torch.equal(old, p.detach()) for old, p in zip(before, parameters(optimizer), strict=True))


def test_what_is_kept_of_a_gradient_is_linear_in_it_and_touches_nothing(make, groups_of, give_gradients) -> None:
    optimizer = make(groups_of(torch.float64))
    run(optimizer, give_gradients, range(3))
    for index in range(3, 6):  # one of them refreshes
        give_gradients(optimizer, index)
        for p in parameters(optimizer):
            before = bits(optimizer, p)
            other = torch.randn_like(p)
            kept = optimizer.reduce_gradient(p, p.grad)
            both = optimizer.reduce_gradient(p, 3 * p.grad + other, first=False)
            torch.testing.assert_close(both, 3 * kept + optimizer.reduce_gradient(p, other, first=False))
            assert same(before, bits(optimizer, p))
            optimizer.drop_gradient(p)
        optimizer.step()


def test_norms_are_true_and_clipping_scales_what_is_applied(make, make_network, loss_of) -> None:
    networks = [make_network(torch.float64) for _ in range(2)]
    optimizers = [make(low_rank_groups(network, rank=4, update_proj_gap=3)) for network in networks]
    updates = attach(optimizers[0])
    for index in range(4):
        updates.begin_update(1)
        loss_of(networks[0], index).backward()
        loss_of(networks[1], index).backward()
        reduced = {p: optimizers[1].reduce_gradient(p, p.grad) for p in networks[1].parameters()}
        full = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in networks[1].parameters()])).float()
        kept = torch.linalg.vector_norm(torch.stack([low.norm() for low in reduced.values()])).float()
        torch.testing.assert_close(updates.full_norm(), full)
        torch.testing.assert_close(updates.norm(), kept)
        updates.scale_(0.25)
        torch.testing.assert_close(updates.full_norm(), full)
        updates.step()
        for p, low in reduced.items():
            optimizers[1].apply_gradient(p, 0.25 * low)
            p.grad = None
        for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_live_bytes_between_backward_and_step_are_those_of_what_is_kept(make, make_network, loss_of) -> None:
    network = make_network()
    optimizer = make(low_rank_groups(network, rank=4))
    updates = attach(optimizer)
    loss_of(network, 0).backward()
    width = {p: p.numel() for p in network.parameters()}
    for p in parameters(optimizer):
        if hasattr(optimizer, "keeps_full_gradient") and not optimizer.keeps_full_gradient(p):
            width[p] = 4 * (4 if "basis_long" in optimizer.state[p] else max(p.shape))
    assert updates.live_bytes() == 4 * sum(width.values())
    updates.step()
    assert updates.live_bytes() == 0


# ------------------------------------------------------------------------------------------------------------- bad values
@pytest.mark.parametrize("state_dtype", ["fp32", "8bit"])
@pytest.mark.parametrize("updates_before", [0, 3])
def test_a_guarded_update_from_a_bad_gradient_keeps_every_bit_but_counters(
    monkeypatch: pytest.MonkeyPatch, make, groups_of, give_gradients, state_dtype: str, updates_before: int
) -> None:
    """Also where a large weight is updated in pieces, of which the bad number is in one only."""
    monkeypatch.setattr(storage, "PIECE_ELEMENTS", {"cpu": 40})
    for dtype, bad in zip((torch.bfloat16, torch.float32, torch.bfloat16), BAD, strict=True):
        optimizer = make(groups_of(dtype), state_dtype=state_dtype, rounding="master")
        run(optimizer, give_gradients, range(updates_before))
        give_gradients(optimizer, updates_before)
        for p in parameters(optimizer):
            p.grad.view(-1)[5] = bad
            before = bits(optimizer, p, COUNTERS)
            assert not optimizer.apply_gradient(p, optimizer.reduce_gradient(p, p.grad), guard=True)
            assert same(before, bits(optimizer, p, COUNTERS))
            assert optimizer.state[p]["step"] == updates_before + 1
        last = all_bits(optimizer)
        run(optimizer, give_gradients, range(updates_before, updates_before + 2))
        assert all(tensor.isfinite().all() for tensor in all_bits(optimizer))
        assert not same(last, all_bits(optimizer))


def test_a_guarded_update_from_a_good_gradient_is_the_plain_one(make, groups_of, give_gradients) -> None:
    plain, guarded = (make(groups_of(torch.bfloat16), state_dtype="8bit") for _ in range(2))
    for index in range(5):
        for optimizer in (plain, guarded):
            give_gradients(optimizer, index)
        plain.step()
        for p in parameters(guarded):
            assert guarded.apply_gradient(p, guarded.reduce_gradient(p, p.grad), guard=True)
    assert same(all_bits(plain), all_bits(guarded))


def test_a_gradient_whose_sum_overflows_is_skipped_whole_even_at_a_refresh(make, groups_of, give_gradients) -> None:
    """Finite numbers, so a basis could be found from it; but no update is made, so none may enter the state."""
    optimizer = make(groups_of())
    run(optimizer, give_gradients, range(3))
    for _ in range(3):
        skipped = 0
        for p in parameters(optimizer):
            before = bits(optimizer, p, COUNTERS)
            huge = torch.full_like(p, 3e38)
            if optimizer.apply_gradient(p, optimizer.reduce_gradient(p, huge), guard=True):
                continue  # almost orthogonal to the subspace
            assert same(before, bits(optimizer, p, COUNTERS))
            skipped += 1
        assert skipped > 0


def test_a_discarded_update_keeps_every_bit_and_is_as_if_it_had_never_been(make, make_network, loss_of) -> None:
    networks = [make_network(torch.bfloat16) for _ in range(2)]
    optimizers = [make(low_rank_groups(network, rank=4, update_proj_gap=3), state_dtype="bf16") for network in networks]
    handles = [attach(optimizer) for optimizer in optimizers]
    for index in range(5):
        before = all_bits(optimizers[0])
        for factors in ((float("nan"), 1.0), (1.0, float("inf"))):
            handles[0].begin_update(2)
            for factor in factors:
                handles[0].begin_micro_batch()
                (loss_of(networks[0], 50 + index) * factor).backward()
            assert not handles[0].norm().isfinite()
            handles[0].discard()
            assert same(before, all_bits(optimizers[0]))
        for network, updates in zip(networks, handles, strict=True):
            updates.begin_update(1)
            loss_of(network, index).backward()
            updates.step()
        assert same(all_bits(optimizers[0]), all_bits(optimizers[1]))


@pytest.mark.parametrize("bad", BAD)
def test_immediate_mode_skips_the_bad_layer_alone(make, make_network, loss_of, bad: float) -> None:
    network = make_network()
    optimizer = make(low_rank_groups(network, rank=4, update_proj_gap=3))
    updates = attach(optimizer, apply="immediate")
    for index in range(2):
        loss_of(network, index).backward()
        updates.step()
    poisoned = network.square.weight
    poison = poisoned.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), bad))
    before = {p: bits(optimizer, p, COUNTERS) for p in network.parameters()}
    loss_of(network, 2).backward()
    updates.step()
    poison.remove()
    kept = {p for p in network.parameters() if same(before[p], bits(optimizer, p, COUNTERS))}
    assert kept == {poisoned}
    assert updates.skipped_updates() == 1


def test_a_plain_step_from_a_bad_gradient_shows_in_that_weight_and_in_no_other(make, groups_of, give_gradients) -> None:
    """As in torch: `step` does not wait to look. A refresh does look, and takes no basis from it."""
    for bad in BAD:
        for updates_before in (0, 1, 3):
            optimizer = make(groups_of())
            run(optimizer, give_gradients, range(updates_before))
            give_gradients(optimizer, updates_before)
            poisoned = parameters(optimizer)[1]
            poisoned.grad[3, 2] = bad
            optimizer.step()
            for p in parameters(optimizer):
                assert bool(p.isfinite().all()) == (p is not poisoned)
            if "basis" in optimizer.state[poisoned]:
                assert optimizer.state[poisoned]["basis"].isfinite().all()


# ------------------------------------------------------------------------------------------------------------------- zero
@pytest.mark.parametrize("state_dtype", ["fp32", "8bit"])
def test_zero_gradients_from_the_start_move_nothing_and_spoil_nothing(make, groups_of, give_gradients, state_dtype: str) -> None:
    for zeros in (1, 6):
        optimizer = make(groups_of(), state_dtype=state_dtype, weight_decay=0.0)
        before = [p.detach().clone() for p in parameters(optimizer)]
        for p in parameters(optimizer):
            p.grad = torch.zeros_like(p)
        for _ in range(zeros):
            optimizer.step()
        assert same(before, [p.detach() for p in parameters(optimizer)])
        run(optimizer, give_gradients, range(4))
        assert all(tensor.isfinite().all() for tensor in all_bits(optimizer))
        assert not any(torch.equal(old, p.detach()) for old, p in zip(before, parameters(optimizer), strict=True))


@pytest.mark.parametrize(("size", "gap"), [(1e-6, 3), (1e6, 1000)])
def test_updates_after_a_zero_gradient_are_as_long_as_usual(make, groups_of, give_gradients, size: float, gap: int) -> None:
    """A layer in front of one that starts at zero sees such gradients. Whatever a Fisher takes from them, the way must not depend on it."""

    def lengths(zeros: int) -> Tensor:
        optimizer = make(groups_of(torch.float64, update_proj_gap=gap), eps=1e-30)
        for p in parameters(optimizer):
            p.grad = torch.zeros_like(p)
        for _ in range(zeros):
            optimizer.step()
        moved = []
        for index in range(ROOT_INTERVAL + 2):
            before = [p.detach().clone() for p in parameters(optimizer)]
            give_gradients(optimizer, index)
            for p in parameters(optimizer):
                p.grad *= size
            optimizer.step()
            moved.append(torch.stack([(p.detach() - old).norm() for p, old in zip(parameters(optimizer), before, strict=True)]))
        return torch.stack(moved)

    usual, after_zeros = lengths(0), lengths(1)
    assert (after_zeros <= 3 * usual.amax(0)).all()
    assert (after_zeros[-1] >= usual[-1] / 3).all()


def test_a_zero_gradient_in_mid_run_decays_as_without_projection(make, groups_of, give_gradients) -> None:
    optimizer = make(groups_of())
    run(optimizer, give_gradients, range(4))
    for p in parameters(optimizer):
        p.grad = torch.zeros_like(p)
    for _ in range(5):
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in all_bits(optimizer))


# --------------------------------------------------------------------------------------------------- shapes, strides, dtypes
def test_strided_gradients_and_weights_give_the_same_numbers(make, groups_of, give_gradients) -> None:
    plain, strided = make(groups_of(torch.float64)), None
    groups = groups_of(torch.float64)
    groups[1]["params"] = [nn.Parameter(p.detach().mT.contiguous().mT) for p in groups[1]["params"]]
    strided = make(groups)
    for index in range(5):
        for optimizer in (plain, strided):
            give_gradients(optimizer, index)
        for p in strided.param_groups[1]["params"]:
            p.grad = p.grad.mT.contiguous().mT if index % 2 else torch.stack([p.grad, p.grad], dim=2)[:, :, 0]
        plain.step()
        strided.step()
    for p, q in zip(parameters(plain), parameters(strided), strict=True):
        torch.testing.assert_close(p, q, atol=1e-9, rtol=1e-9)


def test_bf16_weights_follow_fp32_ones(make, groups_of, give_gradients) -> None:
    """With fp32 masters. Gradients and bases are rounded to bf16, so directions agree but for some per cent.

    Less so with both sides projected: in the first gradient's own bases it is diagonal, and Adam makes ones of the rounding beside it.
    """
    exact, rounded = make(groups_of()), make(groups_of(torch.bfloat16), rounding="master")
    start = [p.detach().clone() for p in parameters(exact)]
    for optimizer in (exact, rounded):
        run(optimizer, give_gradients, range(2))
    for p, q, old in zip(parameters(exact), parameters(rounded), start, strict=True):
        way, other = p.detach() - old, rounded.state[q]["master"] - old.bfloat16()
        cosine = nn.functional.cosine_similarity(way.flatten(), other.flatten(), dim=0)
        assert cosine > (0.7 if "basis_long" in rounded.state[q] else 0.97)


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_fp64_weights_take_moments_in_fewer_bits(make, groups_of, give_gradients, state_dtype: str) -> None:
    exact, fewer = make(groups_of(torch.float64)), make(groups_of(torch.float64), state_dtype=state_dtype)
    start = [p.detach().clone() for p in parameters(exact)]
    for optimizer in (exact, fewer):
        run(optimizer, give_gradients, range(5))  # with a refresh
    for p, q, old in zip(parameters(exact), parameters(fewer), start, strict=True):
        assert nn.functional.cosine_similarity((p - old).flatten(), (q - old).flatten(), dim=0) > 0.9


@dtypes
def test_a_gradient_of_another_floating_dtype_is_taken_as_it_is(make, groups_of, give_gradients, dtype: torch.dtype) -> None:
    """Only through the two phases: torch refuses it in `.grad`."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    optimizer = make(groups_of(dtype))
    for index in range(4):
        give_gradients(optimizer, index)
        for p in parameters(optimizer):
            reduced = optimizer.reduce_gradient(p, p.grad.to(other))
            assert optimizer.apply_gradient(p, reduced, guard=True)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize(
    "settings", [{"fisher": fisher} for fisher in FISHERS if fisher != "two_sided"] + [{"fisher": "none", "moments": "adafactor"}]
)
def test_one_row_and_one_column_have_no_rank_below_them_but_can_be_full(shape: tuple[int, int], settings: dict[str, str]) -> None:
    weight = nn.Parameter(torch.ones(shape))
    for rank in (1, 2):
        with pytest.raises(ValueError, match=rf"has shape .*: rank = {rank} must be below its shorter side 1"):
            NaturalGaLore([{"params": [weight], "rank": rank}], **settings)
    optimizer = NaturalGaLore([{"params": [weight], "rank": "full"}], lr=0.01, **settings)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.full(shape, 0.5)
        optimizer.step()
        assert (weight < before).all()


@pytest.mark.parametrize("shape", [(2, 7), (7, 2), (2, 2)])
def test_the_smallest_matrices_that_can_be_projected_are_in_every_method(make, shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.ones(shape))
    optimizer = make([{"params": [weight], "rank": 1, "update_proj_gap": 2}], **({"min_rank": 1} if make.adapts_rank else {}))
    for _ in range(5):
        before = weight.detach().clone()
        weight.grad = torch.full(shape, 0.5)
        optimizer.step()
        assert weight.isfinite().all()
        assert weight.mean() < before.mean()


def test_a_copy_made_between_the_two_phases_finds_its_own_basis(make, groups_of, give_gradients) -> None:
    optimizer = make(groups_of())
    give_gradients(optimizer, 0)
    reduced = [optimizer.reduce_gradient(p, p.grad) for p in parameters(optimizer)]
    twin = copy.deepcopy(optimizer)
    give_gradients(twin, 0)
    twin.step()
    for p, low in zip(parameters(optimizer), reduced, strict=True):
        optimizer.apply_gradient(p, low)
    assert same(all_bits(optimizer), all_bits(twin))
