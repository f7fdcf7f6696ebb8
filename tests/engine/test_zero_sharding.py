"""Training on several ranks equals training on one process: every method, every stage, gradients accumulated or not, clipped or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.dist.collectives import Collectives
from ngpt.engine.zero_sharding import ShardedUpdates, ZeroSharding
from ngpt.optim import AdamW, AdaRankGrad, GaLore, NaturalGaLore, low_rank_groups
from ngpt.optim.per_layer_hook import attach
from ngpt.optim.sharding import WHOLE, Sharding

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
    **options: Any,
):
    """The same on every rank of a group, each with its share of the rows."""
    ranks = Collectives()
    model = Network(getattr(torch, dtype))
    slices = Slices(model, ranks) if stage == 3 else None
    optimizer = optimizer_of(model, method, ZeroSharding(ranks, stage=stage, weights=slices), **options)
    updates = ShardedUpdates(optimizer, model.parameters(), ranks, apply=apply)
    losses, norms = [], []
    for step in range(STEPS):
        updates.begin_update(micro_batches)
        total = torch.zeros(())
        for rows in batch(step).chunk(micro_batches):  # a basis is found in the first micro-batch: that of all ranks together
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


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_process_at_every_stage(on_ranks: Callable[..., Any], method: str) -> None:
    check_equal(on_ranks, 2, method, [0, 1, 2, 3], 2e-6)
