"""Training on several ranks equals training on one process: every method, every stage, gradients accumulated or not, clipped or not."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ngpt.dist.collectives import Collectives
from ngpt.engine.layer_gradients import Layer
from ngpt.engine.lock_step import Exchange, run_together
from ngpt.engine.zero_sharding import ShardedUpdates, ZeroSharding, layers_of
from ngpt.optim import AdamW, AdaRankGrad, GaLore, NaturalGaLore, low_rank_groups
from ngpt.optim.per_layer_hook import attach
from ngpt.optim.projection import short_side_first
from ngpt.optim.sharding import WHOLE, Flat, OfFirst, Sharding, Sum

TOKENS, WIDTH, INNER, ROWS, STEPS = 21, 12, 17, 12, 7  # neither axis is a multiple of the numbers of ranks

METHODS: dict[str, tuple[type[AdamW], dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "galore": (GaLore, {}),
    "galore, two-sided": (GaLore, {"proj_type": "full", "on_refresh": "rotate"}),
    "galore, random, reset": (GaLore, {"subspace": "random", "on_refresh": "reset", "stagger": True}),
    "galore, randomized": (GaLore, {"subspace": "randomized", "on_refresh": "rotate", "stagger": True}),
    "galore, adafactor": (GaLore, {"moments": "adafactor", "on_refresh": "rotate"}),
    "galore, adafactor, two-sided": (GaLore, {"moments": "adafactor", "proj_type": "full", "on_refresh": "rotate"}),
    "galore, momentum": (GaLore, {"moments": "momentum", "on_refresh": "rotate", "weight_decay": 0.1}),
    "fira": (GaLore, {"complement": "fira", "on_refresh": "rotate", "weight_decay": 0.1}),
    "natural, history": (NaturalGaLore, {"fisher": "history", "history": 4}),
    "natural, two-sided": (NaturalGaLore, {"fisher": "two_sided", "history": 4, "damping": 0.1}),
    "natural, factored": (NaturalGaLore, {"fisher": "factored"}),
    "natural, factored, fira": (NaturalGaLore, {"fisher": "factored", "complement": "fira"}),
    "natural, diagonal": (NaturalGaLore, {"fisher": "diagonal"}),
    "natural, diagonal, embeddings": (NaturalGaLore, {"fisher": "diagonal", "embeddings": True}),
    "natural, diagonal, no complement": (NaturalGaLore, {"fisher": "diagonal", "complement": "none"}),
    "natural, diagonal, full rank": (NaturalGaLore, {"fisher": "diagonal", "rank": "full"}),
    "natural, history, full rank": (NaturalGaLore, {"fisher": "history", "history": 4, "rank": "full"}),
    "adarankgrad": (AdaRankGrad, {"energy": 0.6, "converged_below": 0.99}),
    "adarankgrad, fira, reset": (AdaRankGrad, {"min_rank": 2, "energy": 0.6, "complement": "fira", "on_refresh": "reset"}),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, (WIDTH,), self.norm)
        return x + self.square(self.down(torch.tanh(self.up(y))))


class Network(nn.Module):
    """Three blocks, of which the second may be left out."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.to(dtype)

    def forward(self, tokens: Tensor, *, skip: bool = False) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for number, layer in enumerate(self.layers):
            x = x if skip and number == 1 else layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


def batch(step: int) -> Tensor:
    return torch.randint(0, TOKENS, (ROWS, 6), generator=torch.Generator().manual_seed(step))


def optimizer_of(model: Network, method: str, sharding: Sharding, **options: Any) -> AdamW:
    kind, settings = METHODS[method]
    if kind is AdamW:
        return AdamW(model.named_parameters(), lr=0.02, sharding=sharding, **options)
    settings = settings | options
    of_groups = {key: settings.pop(key) for key in ("rank", "embeddings") if key in settings}
    groups = low_rank_groups(
        model, **({"rank": 4} | of_groups | ({"rank": 4} if of_groups.get("rank") == "full" else {})), update_proj_gap=3
    )
    if of_groups.get("rank") == "full":
        groups = [group | ({"rank": "full"} if "rank" in group else {}) for group in groups]
    return kind(groups, lr=0.02, sharding=sharding, **settings)


class Slices:
    """Weights in flat slices, as at stage 3: what the parameters hold is thrown away after every update, and gathered for the next."""

    def __init__(self, model: nn.Module, ranks: Collectives) -> None:
        self._model, self._ranks = model, ranks
        self._shapes = {p: p.shape for p in model.parameters()}
        self._slices: dict[Tensor, Tensor] = {}
        for p in model.parameters():
            share = -(-p.numel() // ranks.size)
            self._slices[p] = p.detach().reshape(-1)[ranks.rank * share : (ranks.rank + 1) * share].clone()

    def shape(self, p: Tensor) -> torch.Size:
        return self._shapes[p]

    def flat(self, p: Tensor) -> Tensor:
        return self._slices[p]

    def gather(self) -> None:
        for p, slice_ in self._slices.items():
            padded = slice_.new_zeros(-(-p.numel() // self._ranks.size))
            padded[: len(slice_)] = slice_
            p.data = self._ranks.all_gather(padded).reshape(-1)[: p.numel()].view(p.shape)


def train_alone(method: str, *, micro_batches: int = 1, apply: str = "deferred", clip: float = 0.0, dtype: str = "float32", **options: Any):
    """Losses, norms and final weights on one process."""
    model = Network(getattr(torch, dtype))
    optimizer = optimizer_of(model, method, WHOLE, **options)
    updates = attach(optimizer, apply)
    losses, norms = [], []
    for step in range(STEPS):
        updates.begin_update(micro_batches)
        total = torch.zeros(())
        for rows in batch(step).chunk(micro_batches):
            updates.begin_micro_batch()
            loss = model(rows, skip=step == 4) / (ROWS * 5)
            loss.backward()
            total += loss.detach()
        norm = float(updates.norm())
        if 0 < clip < norm:
            updates.scale_(clip / norm)
        updates.step()
        losses.append(float(total))
        norms.append(norm)
    return losses, norms, {name: p.detach().float() for name, p in model.named_parameters()}


def train_sharded(
    method: str,
    stage: int,
    *,
    micro_batches: int = 1,
    apply: str = "deferred",
    clip: float = 0.0,
    dtype: str = "float32",
    offload: bool = False,
    device: str = "cpu",
    **options: Any,
):
    """The same on every rank of a group, each with its share of the rows."""
    ranks = Collectives()
    model = Network(getattr(torch, dtype)).to(device)
    slices = Slices(model, ranks) if stage == 3 else None
    optimizer = optimizer_of(model, method, ZeroSharding(ranks, stage=stage, weights=slices, offload=offload), **options)
    updates = ShardedUpdates(optimizer, model.parameters(), ranks, apply=apply)
    losses, norms = [], []
    for step in range(STEPS):
        updates.begin_update(micro_batches)
        total = torch.zeros(())
        for rows in batch(step).to(device).chunk(micro_batches):  # a basis is found in the first micro-batch: that of all ranks together
            updates.begin_micro_batch()
            loss = model(rows.chunk(ranks.size)[ranks.rank], skip=step == 4) / (ROWS * 5)
            loss.backward()
            updates.end_micro_batch()
            total += loss.detach()
        loss, _, norm, _ = updates.scalars(total).tolist()
        if 0 < clip < norm:
            updates.scale_(clip / norm)
        updates.step()
        if slices is not None:
            slices.gather()
        losses.append(loss)
        norms.append(norm)
    return losses, norms, {name: p.detach().float() for name, p in model.named_parameters()}


def train_in_stages(method: str, stages: list[int], options: dict[str, Any]) -> list[Any]:
    return [train_sharded(method, stage, **options) for stage in stages]


def check_equal(on_ranks: Callable[..., Any], world_size: int, method: str, stages: list[int], tolerance: float, **options: Any) -> None:
    losses, norms, weights = train_alone(method, **options)
    results = on_ranks(world_size, train_in_stages, method, stages, options)
    for by_stage in results:
        for stage, (own_losses, own_norms, own_weights) in zip(stages, by_stage, strict=True):
            torch.testing.assert_close(
                torch.tensor(own_losses), torch.tensor(losses), rtol=tolerance, atol=0, msg=f"losses at stage {stage}"
            )
            torch.testing.assert_close(torch.tensor(own_norms), torch.tensor(norms), rtol=100 * tolerance, atol=0)
            for name, weight in weights.items():
                difference = (own_weights[name] - weight).abs().max() / weight.abs().max()
                assert difference < 100 * tolerance, f"{name} at stage {stage} differs by {difference:.1e}"
    for stage in range(len(stages)):
        for by_stage in results[1:]:
            for name, weight in results[0][stage][2].items():
                assert torch.equal(weight, by_stage[stage][2][name]), f"ranks have different bits of {name}"


SEVERAL = [
    "adamw",
    "galore, two-sided",
    "galore, adafactor",
    "fira",
    "natural, history",
    "natural, factored",
    "natural, diagonal",
    "adarankgrad",
]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_process_at_every_stage(on_ranks: Callable[..., Any], method: str) -> None:
    check_equal(on_ranks, 2, method, [0, 1, 2, 3], 2e-6)


@pytest.mark.parametrize("method", SEVERAL)
def test_accumulated_and_clipped_gradients_of_two_ranks_equal_those_of_one_process(on_ranks: Callable[..., Any], method: str) -> None:
    check_equal(on_ranks, 2, method, [0, 1, 2, 3], 2e-6, micro_batches=2, clip=0.5)


@pytest.mark.parametrize("method", SEVERAL)
def test_immediate_updates_of_two_ranks_equal_those_of_one_process(on_ranks: Callable[..., Any], method: str) -> None:
    check_equal(on_ranks, 2, method, [1, 3], 2e-6, apply="immediate")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS if os.environ.get("NGPT_FULL") else ["adamw", "fira", "natural, history", "natural, diagonal"])
def test_four_ranks_equal_one_process(on_ranks: Callable[..., Any], method: str) -> None:
    check_equal(on_ranks, 4, method, [1, 3], 2e-6)
    check_equal(on_ranks, 4, method, [2], 2e-6, micro_batches=3, clip=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("method", SEVERAL)
def test_three_ranks_equal_one_process(on_ranks: Callable[..., Any], method: str) -> None:
    check_equal(on_ranks, 3, method, [0, 2, 3], 2e-6)


@pytest.mark.parametrize("method", ["adamw", "galore", "galore, two-sided", "natural, diagonal"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
def test_bf16_weights_have_the_same_bits_on_all_ranks_and_stay_close_to_one_process(
    on_ranks: Callable[..., Any], method: str, rounding: str
) -> None:
    options = {"dtype": "bfloat16", "rounding": rounding}
    losses, _, _ = train_alone(method, **options)
    first, second = on_ranks(2, train_in_stages, method, [0, 1, 2, 3], options)
    for (own_losses, _, weights), (_, _, others) in zip(first, second, strict=True):
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=2e-3, atol=0)
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_moments_in_fewer_bits_stay_close_to_one_process(on_ranks: Callable[..., Any], state_dtype: str) -> None:
    for method in ("adamw", "galore"):
        losses, _, _ = train_alone(method, state_dtype=state_dtype)
        for own_losses, _, _ in on_ranks(2, train_in_stages, method, [0, 1, 3], {"state_dtype": state_dtype})[1]:
            torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-3, atol=0)


def train_offloaded(method: str, stage: int, device: str, options: dict[str, Any]) -> list[Any]:
    return [train_sharded(method, stage, device=device, offload=offload, **options) for offload in (False, True)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rounding", [None, "master"])
@pytest.mark.parametrize("method", SEVERAL)
def test_state_in_the_memory_of_the_cpu_changes_nothing(
    on_ranks: Callable[..., Any], method: str, rounding: str | None, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    options = {"dtype": "bfloat16", "rounding": rounding} if rounding else {}
    for stage in (1, 3):
        here, offloaded = on_ranks(1, train_offloaded, method, stage, device, options)[0]
        torch.testing.assert_close(torch.tensor(offloaded[0]), torch.tensor(here[0]), rtol=1e-3 if rounding else 2e-6, atol=0)


# --------------------------------------------------------------------------------------------- gradients that are bad, or missing
def one_update(method: str, stage: int, *, apply: str = "deferred", spoil: bool = False, skip_on: int | None = None) -> Any:
    """Weights and parts of the state before and after the update that follows two ordinary ones, its scalars, and the next loss."""
    ranks = Collectives()
    model = Network(torch.float32)
    slices = Slices(model, ranks) if stage == 3 else None
    optimizer = optimizer_of(model, method, ZeroSharding(ranks, stage=stage, weights=slices))
    updates = ShardedUpdates(optimizer, model.parameters(), ranks, apply=apply)

    def run(step: int, *, skip: bool = False) -> list[float]:
        updates.begin_update(1)
        updates.begin_micro_batch()
        loss = model(batch(step).chunk(ranks.size)[ranks.rank], skip=skip) / (ROWS * 5)
        loss.backward()
        updates.end_micro_batch()
        scalars = updates.scalars(loss.detach()).tolist()
        if torch.tensor(scalars).isfinite().all() or updates.immediate:
            updates.step()
        else:
            updates.discard()
        if slices is not None:
            slices.gather()
        return scalars

    def snapshot() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return weights, {name: part.values.clone() for name, part in optimizer.state_parts().items()}

    run(0)
    run(1)
    before = snapshot()
    handle = None
    if spoil and ranks.rank == ranks.size - 1:
        handle = model.layers[1].up.weight.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    scalars = run(2, skip=ranks.rank == skip_on or skip_on == -1)
    after = snapshot()
    if handle is not None:
        handle.remove()
    return before, after, scalars, run(3)[0]


def bad_update(stage: int, apply: str, method: str) -> Any:
    return one_update(method, stage, apply=apply, spoil=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["galore", "natural, diagonal"])
def test_a_nan_on_one_rank_skips_the_update_on_all_and_leaves_every_bit(on_ranks: Callable[..., Any], method: str, stage: int) -> None:
    for before, after, scalars, next_loss in on_ranks(2, bad_update, stage, "deferred", method):
        assert not torch.tensor(scalars[1]).isfinite()
        for old, new in zip(before, after, strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)
        assert torch.tensor(next_loss).isfinite()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("method", ["adamw", "galore", "natural, diagonal"])
def test_immediate_mode_leaves_out_the_one_matrix_with_a_nan_on_all_ranks(on_ranks: Callable[..., Any], method: str, stage: int) -> None:
    results = on_ranks(2, bad_update, stage, "immediate", method)
    for (before, _), (after, state), scalars, next_loss in results:
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        # Below the spoilt layer backward is spoilt too.
        assert "layers.1.up.weight" not in changed
        assert {"layers.2.up.weight", "head.weight", "layers.1.down.weight"} <= changed
        assert scalars[3] >= 1
        assert all(values.isfinite().all() for values in state.values() if values.is_floating_point())
        assert torch.tensor(next_loss).isfinite()
    assert all(torch.equal(results[0][1][0][name], results[1][1][0][name]) for name in results[0][1][0])


def unused_update(stage: int, skip_on: int, method: str) -> Any:
    return one_update(method, stage, skip_on=skip_on)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("method", ["adamw", "galore, randomized", "natural, diagonal"])
def test_a_layer_that_one_rank_does_not_use_counts_as_zero_there(on_ranks: Callable[..., Any], method: str, stage: int) -> None:
    first, second = on_ranks(2, unused_update, stage, 1, method)
    assert all(torch.equal(first[1][0][name], second[1][0][name]) for name in first[1][0])
    assert not torch.equal(first[0][0]["layers.1.up.weight"], first[1][0]["layers.1.up.weight"])


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("method", ["adamw", "galore, randomized", "natural, diagonal"])
def test_a_layer_that_no_rank_uses_is_left_alone(on_ranks: Callable[..., Any], method: str, stage: int) -> None:
    for before, after, _, _ in on_ranks(2, unused_update, stage, -1, method):
        for old, new in zip(before, after, strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("layers.1."))
            assert not all(torch.equal(old[name], new[name]) for name in old)


# ------------------------------------------------------------------------------------------------------------- memory and state
def layers_with_gradients(method: str, apply: str, micro_batches: int) -> int:
    """The largest number of layers of which full gradients of matrices were alive at one time, watched at every gradient."""
    ranks, model = Collectives(), Network(torch.float32)
    optimizer = optimizer_of(model, method, ZeroSharding(ranks, stage=2))
    updates = ShardedUpdates(optimizer, model.parameters(), ranks, apply=apply)
    alive: dict[int, tuple[str, Any]] = {}
    most = 0
    receive = Layer.receive

    def watch(layer: Layer, p: Tensor, grad: Tensor) -> None:
        nonlocal most
        name = optimizer.slot(p).name
        if p.ndim == 2 and name.startswith("layers"):
            alive[len(alive)] = (name.rsplit(".", 2)[0], weakref.ref(grad))
        receive(layer, p, grad)
        del grad
        most = max(most, len({name for name, reference in alive.values() if reference() is not None}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "receive", watch)
        for step in range(4):
            updates.begin_update(micro_batches)
            for rows in batch(step).chunk(micro_batches):
                updates.begin_micro_batch()
                (model(rows.chunk(ranks.size)[ranks.rank]) / (ROWS * 5)).backward()
                updates.end_micro_batch()
            updates.scalars(torch.zeros(()))
            updates.step()
            alive.clear()
    return most


@pytest.mark.parametrize("method", ["adamw", "galore", "galore, randomized", "natural, history", "natural, diagonal", "fira"])
@pytest.mark.parametrize(("apply", "micro_batches"), [("deferred", 1), ("deferred", 3), ("immediate", 1)])
def test_full_gradients_of_one_layer_at_most_are_alive(on_ranks: Callable[..., Any], method: str, apply: str, micro_batches: int) -> None:
    assert max(on_ranks(2, layers_with_gradients, method, apply, micro_batches)) <= 1


def state_after_training(method: str, stage: int) -> dict[str, tuple[Tensor, list[int], int]]:
    ranks, model = Collectives(), Network(torch.float32)
    slices = Slices(model, ranks) if stage == 3 else None
    optimizer = optimizer_of(model, method, ZeroSharding(ranks, stage=stage, weights=slices))
    updates = ShardedUpdates(optimizer, model.parameters(), ranks, apply="deferred")
    for step in range(4):
        updates.begin_update(1)
        updates.begin_micro_batch()
        (model(batch(step).chunk(ranks.size)[ranks.rank]) / (ROWS * 5)).backward()
        updates.end_micro_batch()
        updates.scalars(torch.zeros(()))
        updates.step()
        if slices is not None:
            slices.gather()
    return {name: (part.values.clone(), list(part.shape), part.start) for name, part in optimizer.state_parts().items()}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "method", ["adamw", "galore, two-sided", "galore, adafactor", "natural, history", "natural, factored", "natural, diagonal"]
)
def test_parts_of_all_ranks_make_the_whole_state(on_ranks: Callable[..., Any], method: str, stage: int) -> None:
    whole = on_ranks(2, state_after_training, method, 0)[0]
    parts = on_ranks(2, state_after_training, method, stage)
    assert all(rank.keys() == whole.keys() for rank in parts)
    for name, (values, shape, _) in whole.items():
        pieces = [rank[name] for rank in parts]
        assert all(piece[1] == shape for piece in pieces), name
        replicated = list(pieces[0][0].shape) == shape
        joined = pieces[0][0] if replicated else torch.cat([piece for piece, _, _ in pieces], dim=-1)
        torch.testing.assert_close(joined.float(), values.float(), rtol=1e-3, atol=1e-5, msg=name)
        starts = [start for _, _, start in pieces]
        assert starts == ([0, 0] if replicated else [0, pieces[0][0].shape[-1]]), name


# ---------------------------------------------------------------------------------------------------------------- the pieces
class OneOfMany:
    """A rank of a group that never communicates."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), size=st.integers(1, 7))
def test_columns_of_all_ranks_become_flat_slices(rows: int, columns: int, size: int) -> None:
    weight = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    change_ab = short_side_first(weight)
    share = -(-change_ab.shape[1] // size)
    exchanges = []
    for rank in range(size):
        own_ab = change_ab[:, rank * share : (rank + 1) * share]
        exchanges.append(Exchange(Flat(own_ab, weight), WHOLE, OneOfMany(rank, size)))
    flat_share = -(-weight.numel() // size)
    for rank, exchange in enumerate(exchanges):
        pieces = [other.for_rank(rank).reshape(-1) for other in exchanges]
        assert [len(piece) for piece in pieces] == exchange.sizes_from()
        expected = weight.view(-1)[rank * flat_share : (rank + 1) * flat_share]
        assert torch.equal(exchange.assemble(pieces), expected)


class Counting(Collectives):
    """One process that counts its collectives as if there were another one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def sum_(self, tensor: Tensor) -> Tensor:
        self.calls.append("sum")
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        self.calls.append("broadcast")
        return tensor


def asking(number: int) -> Any:
    total = yield Sum(torch.tensor([float(number)]))
    if number % 2:
        total = total + (yield Sum(torch.ones(2))).sum()
    same = yield OfFirst(total)
    return number, same


def test_requests_of_a_round_share_one_collective() -> None:
    ranks = Counting()
    results = run_together([asking(number) for number in range(4)], sharding=WHOLE, ranks=ranks, wire=torch.float32, over_ranks=True)
    assert [number for number, _ in results] == [0, 1, 2, 3]
    assert [float(same) for _, same in results] == [0, 3, 2, 5]
    assert ranks.calls == ["sum", "sum", "broadcast", "broadcast"]


def test_layers_follow_the_names_and_the_order_of_backward() -> None:
    model = Network(torch.float32)
    optimizer = optimizer_of(model, "natural, diagonal, embeddings", WHOLE)
    names = [[optimizer.slot(p).name for p in layer] for layer in layers_of(optimizer, model.parameters())]
    assert names[0] == ["head.weight"]
    assert names[-1] == ["embed.weight"]
    assert [layer[0].rsplit(".", 1)[0] for layer in names[1:-1]] == ["layers.2", "layers.1", "layers.0"]
    assert {len(layer) for layer in names[1:-1]} == {4}
