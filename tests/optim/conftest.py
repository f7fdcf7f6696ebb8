"""A small network and its training, shared by the tests of the optimizer library."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn


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
