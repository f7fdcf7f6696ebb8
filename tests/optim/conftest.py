"""Every method of the library, a small network and its training, shared by the tests of the optimizer library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngpt.optim import AdamW, AdaRankGrad, GaLore, NaturalGaLore

METHODS: dict[str, tuple[type[AdamW], dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "galore": (GaLore, {}),
    "galore, two-sided": (GaLore, {"proj_type": "full", "on_refresh": "rotate"}),
    "galore, random, reset": (GaLore, {"subspace": "random", "on_refresh": "reset", "stagger": True}),
    "galore, adafactor": (GaLore, {"moments": "adafactor", "on_refresh": "rotate"}),
    "galore, momentum": (GaLore, {"moments": "momentum", "on_refresh": "rotate"}),
    "fira": (GaLore, {"complement": "fira", "on_refresh": "rotate"}),
    "natural, history": (NaturalGaLore, {"fisher": "history", "history": 4}),
    "natural, two-sided": (NaturalGaLore, {"fisher": "two_sided", "history": 4}),
    "natural, factored": (NaturalGaLore, {"fisher": "factored"}),
    "natural, factored, fira": (NaturalGaLore, {"fisher": "factored", "complement": "fira"}),
    "natural, diagonal": (NaturalGaLore, {"fisher": "diagonal"}),
    "natural, diagonal, no complement": (NaturalGaLore, {"fisher": "diagonal", "complement": "none"}),
    "natural, diagonal, full rank": (NaturalGaLore, {"fisher": "diagonal", "rank": "full"}),
    "natural, history, full rank": (NaturalGaLore, {"fisher": "history", "history": 4, "rank": "full"}),
    "adarankgrad": (AdaRankGrad, {"energy": 0.6, "converged_below": 0.99}),
    "adarankgrad, fira, reset": (AdaRankGrad, {"min_rank": 2, "energy": 0.6, "complement": "fira", "on_refresh": "reset"}),
}
Make = Callable[..., AdamW]


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Make:
    """Builds the optimizer of one method from groups such as `low_rank_groups` returns; every method in turn."""
    method, settings = METHODS[request.param]

    def build(groups: list[dict[str, Any]], **options: Any) -> AdamW:
        if method is AdamW:
            return AdamW([{"params": group["params"]} for group in groups], lr=0.01, **options)
        rank = {"rank": settings["rank"]} if "rank" in settings else {}
        groups = [group | rank if "rank" in group else group for group in groups]
        return method(groups, lr=0.01, **({key: value for key, value in settings.items() if key != "rank"} | options))

    build.adapts_rank = method is AdaRankGrad
    build.is_low_rank = method is not AdamW
    return build


@pytest.fixture
def groups_of() -> Callable[..., list[dict[str, Any]]]:
    """Groups of new parameters of three shapes and a vector, refreshed every three updates: what every method can take."""

    def groups(dtype: torch.dtype = torch.float32, **options: Any) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(3)
        shapes = ((9,), (8, 12), (12, 8), (10, 10))
        vector, *matrices = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        return [{"params": [vector]}, {"params": matrices, "rank": 4, "update_proj_gap": 3, "scale": 1.0} | options]

    return groups


@pytest.fixture
def give_gradients() -> Callable[..., None]:
    """Sets the gradients of update number `index` on every parameter: a low-rank part, a trend and noise."""

    def give(optimizer: torch.optim.Optimizer, index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        for group in optimizer.param_groups:
            for p in group["params"]:
                noise = torch.randn(p.shape, generator=generator)
                strong = torch.outer(noise[:, 0], noise[0]) if p.ndim == 2 else 0.0
                p.grad = (0.5**index * strong + 0.3 * noise + 0.1).to(p.dtype)

    return give


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-for-bit comparisons need one order of summation, and tiny matrices gain nothing from more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Network(nn.Module):
    """Embedding, a tall and a wide matrix, a square one without bias, a norm and a head: every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 12)
        self.up = nn.Linear(12, 20)
        self.square = nn.Linear(20, 20, bias=False)
        self.down = nn.Linear(20, 12)
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        hidden = hidden + self.down(torch.tanh(self.square(torch.tanh(self.up(hidden)))))
        return self.lm_head(self.norm(hidden))


@pytest.fixture
def make_network() -> Callable[..., nn.Module]:
    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(7)
        network = Network().to(dtype)
        torch.random.set_rng_state(generator_state)
        return network

    return make


@pytest.fixture
def loss_of() -> Callable[[nn.Module, int], Tensor]:
    """The mean loss on batch number `index`: tokens to be shifted by three."""

    def loss(network: nn.Module, index: int, rows: slice = slice(None)) -> Tensor:
        tokens = torch.randint(0, 13, (32,), generator=torch.Generator().manual_seed(index))
        logits = network(tokens[rows]).float()
        return nn.functional.cross_entropy(logits, (tokens[rows] + 3) % 13)

    return loss


@pytest.fixture
def train(loss_of: Callable[..., Tensor]) -> Callable[..., list[float]]:
    def run(network: nn.Module, optimizer: torch.optim.Optimizer, batches: range) -> list[float]:
        losses = []
        for index in batches:
            optimizer.zero_grad()
            loss = loss_of(network, index)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return run


@pytest.fixture
def identical() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two networks have the same weights, bit for bit."""

    def same(one: nn.Module, other: nn.Module) -> bool:
        return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))

    return same
