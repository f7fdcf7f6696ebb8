"""The engine alone: accumulation, clipping, skipping and exact bytes, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ngpt.engine.local import LocalEngine, weight_dtype
from ngpt.optim import AdamW, NaturalGaLore, low_rank_groups

CPU = torch.device("cpu")
MODES = ("whole", "deferred", "immediate")


class Regression(nn.Module):
    """Sum of squared errors of a two-layer net, in the place of a language model's summed loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10, bias=False)
        self.second = nn.Linear(10, 3)

    def forward(self, x, y):
        return (self.second(torch.tanh(self.first(x))) - y).square().sum().float()


def batches(count, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(rows, 6, generator=generator), "y": torch.randn(rows, 3, generator=generator)} for _ in range(count)]


def build(
    apply="whole", *, clip=0.0, dtype=torch.float32, optimizer=lambda model: AdamW(model.named_parameters(), lr=0.1, weight_decay=0.0)
):
    torch.manual_seed(0)
    return LocalEngine(Regression, optimizer, device=CPU, dtype=dtype, apply=apply, grad_clip=clip)


def update(engine, micro_batches, *, lr=1.0, divisor=8.0):
    engine.begin_update(lr_multiplier=lr, loss_divisor=divisor, num_micro_batches=len(micro_batches))
    loss = sum(engine.accumulate(batch) for batch in micro_batches) / divisor
    return loss, engine.finish_update(loss)


@pytest.mark.parametrize("apply", MODES)
def test_updates_equal_plain_torch(apply):
    engine = build(apply)
    torch.manual_seed(0)
    model = Regression()
    reference = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for step, batch in enumerate(batches(5)):
        _, outcome = update(engine, [batch], lr=0.5**step, divisor=4.0)
        reference.param_groups[0]["lr"] = 0.1 * 0.5**step
        reference.zero_grad()
        (model(**batch) / 4.0).backward()
        assert outcome.grad_norm == pytest.approx(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(), rel=1e-5)
        assert outcome.lr == pytest.approx(0.1 * 0.5**step)
        reference.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(engine.weights())[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apply", MODES[:2])
def test_micro_batches_add_up_to_the_whole_batch(apply):
    parts = batches(4)
    whole = {key: torch.cat([part[key] for part in parts]) for key in ("x", "y")}
    split, joined = build(apply), build(apply)
    for _ in range(3):
        loss, _ = update(split, parts, divisor=16.0)
        expected, _ = update(joined, [whole], divisor=16.0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in joined.weights():
        torch.testing.assert_close(dict(split.weights())[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("apply", MODES[:2])
def test_clipping_scales_the_gradient_to_the_limit(apply):
    def sgd_like(model):  # with eps this large AdamW's first step is linear in the gradient
        return AdamW(model.named_parameters(), lr=1e6, eps=1e6, weight_decay=0.0)

    free, clipped = build(apply, optimizer=sgd_like), build(apply, clip=0.01, optimizer=sgd_like)
    start = {name: weight.clone() for name, weight in free.weights()}
    (batch,) = batches(1)
    _, outcome = update(free, [batch])
    update(clipped, [batch])
    assert outcome.grad_norm > 0.1
    for name, before in start.items():
        torch.testing.assert_close(
            dict(clipped.weights())[name] - before, (dict(free.weights())[name] - before) * 0.01 / outcome.grad_norm, rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("apply", MODES[:2])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing(apply, poison):
    engine = build(apply, optimizer=lambda model: NaturalGaLore(low_rank_groups(model, rank=2), lr=0.1))
    first, second = batches(2)
    update(engine, [first])
    weights = {name: weight.clone() for name, weight in engine.weights()}
    state = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, engine.optimizer.state_dict())
    if poison == "loss":
        second["y"][0, 0] = math.inf
        _, outcome = update(engine, [second])
    else:
        handle = engine.model.first.weight.register_hook(lambda grad: grad * math.nan)
        _, outcome = update(engine, [second])
        handle.remove()
    assert not outcome.applied
    assert all(torch.equal(weights[name], weight) for name, weight in engine.weights())
    torch.testing.assert_close(engine.optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    _, outcome = update(engine, [first])
    assert outcome.applied


def test_immediate_mode_lets_no_loss_that_is_not_finite_reach_backward():
    engine = build("immediate")
    weights = {name: weight.clone() for name, weight in engine.weights()}
    (batch,) = batches(1)
    batch["y"][0, 0] = math.nan
    _, outcome = update(engine, [batch])
    assert not outcome.applied
    assert all(torch.equal(weights[name], weight) for name, weight in engine.weights())


def test_deferred_keeps_only_the_projected_gradient_of_a_matrix():
    def optimizer(model):
        return NaturalGaLore(low_rank_groups(model, rank=2, targets=["first"]), lr=0.1, fisher="history")

    plain_bytes = 4 * (3 * 10 + 3)  # the second layer is not projected
    (batch,) = batches(1)
    assert update(build("whole", optimizer=optimizer), [batch])[1].gradient_bytes == plain_bytes + 4 * 6 * 10
    assert update(build("deferred", optimizer=optimizer), [batch])[1].gradient_bytes == plain_bytes + 4 * 2 * 10
    assert update(build("immediate", optimizer=optimizer), [batch])[1].gradient_bytes == 0


def test_bytes_are_exact():
    engine = build(dtype=torch.bfloat16)
    numbers = 6 * 10 + 10 * 3 + 3
    sizes = engine.state_bytes()
    assert sizes["weights"] == 2 * numbers
    assert sizes["moments"] == 2 * 4 * numbers
    tensors = [value for state in engine.optimizer.state_dict()["state"].values() for value in state.values()]
    assert sizes["optimizer_state"] == sum(value.nbytes for value in tensors)


def test_evaluation_builds_no_graph_and_matches_the_training_loss():
    engine = build()
    (batch,) = batches(1)
    evaluated = engine.evaluate(batch)
    assert not evaluated.requires_grad
    loss, _ = update(engine, [batch], divisor=1.0)
    assert loss.item() == pytest.approx(evaluated.item())


def test_weights_that_do_not_fit_are_all_named():
    engine = build()
    wrong = {"first.weight": torch.zeros(2, 2), "second.weight": torch.zeros(3, 10), "third.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="do not fit") as error:
        engine.load_weights(wrong.__getitem__, list(wrong))
    message = str(error.value)
    assert "missing: second.bias" in message
    assert "unknown: third.weight" in message
    assert "first.weight: (2, 2) in the file, (10, 6) in the model" in message


def test_a_filled_engine_continues_as_the_one_that_was_read():
    """With the settings of its own run: rates and decays are not state."""

    def optimizer(lr):
        return lambda model: NaturalGaLore(low_rank_groups(model, rank=2), lr=lr, fisher="history")

    engine = build("deferred", optimizer=optimizer(0.1))
    first, second = batches(2)
    update(engine, [first])
    other = build("deferred", optimizer=optimizer(0.3))
    saved = {name: weight.clone() for name, weight in engine.weights()}
    other.load_weights(saved.__getitem__, list(saved))
    theirs = other.optimizer_parts()
    for key, part in engine.optimizer_parts().items():
        theirs[key].values.copy_(part.values)
    update(engine, [second], lr=3.0)
    assert update(other, [second])[1].lr == pytest.approx(0.3)
    for (name, weight), (_, expected) in zip(other.weights(), engine.weights(), strict=True):
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_nearest", "bf16_master"])
def test_precision_says_how_weights_are_stored(precision):
    assert weight_dtype(precision) is (torch.float32 if precision == "fp32" else torch.bfloat16)


def test_immediate_mode_counts_the_matrices_it_left_out():
    engine = build("immediate")
    first = {name: weight.clone() for name, weight in engine.weights()}
    engine.model.first.weight.register_hook(lambda grad: grad * math.nan)
    (batch,) = batches(1)
    _, outcome = update(engine, [batch])
    assert outcome.applied
    assert outcome.skipped_matrices == 1
    assert math.isnan(outcome.applied_grad_norm)
    after = dict(engine.weights())
    assert torch.equal(after["first.weight"], first["first.weight"])
    assert not torch.equal(after["second.weight"], first["second.weight"])


@pytest.mark.parametrize("rows", [1, 4])
def test_clipping_a_low_rank_update_does_not_depend_on_the_micro_batch(rows):
    """The basis is fixed by a first update on the same batch, so only the gradient's split differs."""

    def optimizer(model):
        return NaturalGaLore(low_rank_groups(model, rank=2), lr=0.1, eps=1.0, fisher="none", stagger=False)

    whole, split = build("deferred", clip=0.01, optimizer=optimizer), build("deferred", clip=0.01, optimizer=optimizer)
    (batch,) = batches(1, rows=4)
    parts = [{key: value[i : i + rows] for key, value in batch.items()} for i in range(0, 4, rows)]
    for engine in (whole, split):
        update(engine, [batch])
    _, outcome = update(whole, [batch])
    _, of_parts = update(split, parts)
    assert of_parts.applied_grad_norm == pytest.approx(outcome.applied_grad_norm, rel=1e-5)
    for name, weight in whole.weights():
        torch.testing.assert_close(dict(split.weights())[name], weight, rtol=1e-5, atol=1e-7)
