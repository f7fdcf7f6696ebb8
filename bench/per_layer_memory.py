"""Peak memory of one update with per-layer updates against plain backward and step: `python -m bench.per_layer_memory`.

On the CPU, counted, not sampled: gradients are what `.grad` and the per-layer handle hold whenever one is born; all tensors are what
operations allocate, as the dispatcher sees them (not the temporaries inside one kernel), beyond weights and optimizer state, which are
there before. The batch is small, as activations are not what is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.live_bytes import LiveTensorBytes
from bench.presets import model_of
from ngpt.config.schema import ModelConfig
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups
from ngpt.optim.per_layer_hook import attach

GAP = 2  # updates between refreshes: of two consecutive updates, one refreshes and one does not
METHODS: dict[str, Callable[[nn.Module, int], AdamW]] = {
    "AdamW": lambda model, _: AdamW(model.named_parameters()),
    "GaLore": lambda model, rank: GaLore(low_rank_groups(model, rank=rank, update_proj_gap=GAP), subspace="randomized"),
    "Natural, factored": lambda model, rank: _natural(model, rank, fisher="factored"),
    "Natural, diagonal": lambda model, rank: _natural(model, rank, fisher="diagonal"),
}
MODES = ("plain", "deferred", "immediate")


def _natural(model: nn.Module, rank: int, **options: Any) -> AdamW:
    return NaturalGaLore(low_rank_groups(model, rank=rank, update_proj_gap=GAP), stagger=False, **options)


class Peaks(NamedTuple):
    """Most bytes at one time: of gradients, and of all tensors beyond weights and state, in an update without and with a refresh."""

    gradients: int
    tensors: int
    tensors_at_refresh: int


def measure(config: ModelConfig, method: str, mode: str, *, rank: int, rows: int, seq_len: int) -> Peaks:
    """The peaks of one update of a fresh model. Raises whatever the method raises where it does not exist."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config, loss_chunk_tokens=32)
    tokens = torch.randint(config.vocab_size, (rows, seq_len))
    optimizer = METHODS[method](model, rank)
    params = list(model.parameters())
    gradient_peak = 0

    def on_birth(_: Tensor) -> None:
        nonlocal gradient_peak
        grads = [p.grad for p in params if p.grad is not None]
        held = handle.live_bytes() if handle else sum(grad.numel() * grad.element_size() for grad in grads)
        gradient_peak = max(gradient_peak, held)

    hooks = [p.register_post_accumulate_grad_hook(on_birth) for p in params]  # before those of attach, so that they see each gradient
    handle = None if mode == "plain" else attach(optimizer, apply=mode)
    peaks = []
    for _ in range(2 * GAP):
        with LiveTensorBytes() as count:
            (model(tokens, tokens) / tokens.numel()).backward()
            (handle or optimizer).step()
            optimizer.zero_grad()
        peaks.append(count.peak)
    for hook in hooks:
        hook.remove()
    return Peaks(gradient_peak, peaks[-1], peaks[-2])


def table(results: dict[tuple[str, str], Peaks]) -> Iterator[str]:
    """A row for each method and mode, in MiB, with the share of the same method's plain backward."""
    yield "| method | gradients | MiB | / plain | all tensors, MiB | / plain | at a refresh, MiB | / plain |"
    yield "|---|---|---|---|---|---|---|---|"
    for (method, mode), peaks in results.items():
        plain = results[method, "plain"]
        cells = [f"{peak / 2**20:.1f} | {peak / reference:.3f}" for peak, reference in zip(peaks, plain, strict=True)]
        yield f"| {method} | {mode} | " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    """Measure every method in every mode and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.per_layer_memory", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="60m", help="shape of conf/model/llama_SIZE.yaml (default 60m)")
    parser.add_argument("--vocab-size", type=int, help="rows of embedding and head (default: the model's)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the projection (default 128)")
    parser.add_argument("--rows", type=int, default=1, help="rows of the micro-batch (default 1)")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens of a row (default 64)")
    options = parser.parse_args(argv)
    config = model_of(options.size)
    config = dataclasses.replace(config, vocab_size=options.vocab_size or config.vocab_size)
    results = {
        (method, mode): measure(config, method, mode, rank=options.rank, rows=options.rows, seq_len=options.seq_len)
        for method in METHODS
        for mode in MODES
    }
    print(f"{options.size}, vocabulary {config.vocab_size}, rank {options.rank}, {options.rows} x {options.seq_len} tokens, float32, CPU")
    print("\n".join(["", *table(results)]))


if __name__ == "__main__":
    main()
