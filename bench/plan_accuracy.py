"""The planned peak of memory beside the measured one of the real engine, as Markdown: `python -m bench.plan_accuracy`.

On the CPU every allocation is counted (bench/allocated_bytes.py), on a GPU it is torch.cuda.max_memory_allocated; from before the model is
built to the end of two updates, on synthetic tokens. What is counted are tensors and the temporaries of kernels, nothing of the process.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench.allocated_bytes import AllocatedBytes, peak_on_gpu
from ngpt import build
from ngpt.config.compose import compose_run
from ngpt.config.schema import RunConfig
from ngpt.data.batch import Batch
from ngpt.dist.collectives import Collectives
from ngpt.dist.ranks import Ranks
from ngpt.engine.base import Engine
from ngpt.planning.memory import estimate_memory

STEPS = 2  # the first finds subspaces, the second rotates what is kept of the past


class Case(NamedTuple):
    """Overrides of a run; `in_tests`: small enough for the tests."""

    overrides: tuple[str, ...]
    in_tests: bool = False


def _case(model: str, *overrides: str, in_tests: bool = False) -> Case:
    refreshing = (
        () if "optimizer=adamw" in overrides or "optimizer=lora" in overrides else ("optimizer.update_proj_gap=2", "optimizer.rank=16")
    )
    rank = ("optimizer.rank=16",) if "optimizer=lora" in overrides else ()
    return Case((*MODELS[model], "trainer.max_steps=2", *refreshing, *rank, *overrides), in_tests)


MODELS = {
    # What dominates: activations; weights, gradients and updates; logits, embedding and head.
    "9M, 4 x 256": (
        "model=llama_9m", "model.vocab_size=512", "trainer.seq_len=256", "trainer.micro_batch_size=4", "trainer.global_batch_size=4",
    ),
    "20M, 2 x 16": (
        "model=llama_20m", "model.vocab_size=256", "trainer.seq_len=16", "trainer.micro_batch_size=2", "trainer.global_batch_size=2",
    ),
    "20M, 32,000 tokens, 2 x 64": (
        "model=llama_20m", "trainer.seq_len=64", "trainer.micro_batch_size=2", "trainer.global_batch_size=2",
    ),
}  # fmt: skip
ACTIVATIONS, UPDATES, LOGITS = MODELS
FP32, BF16 = "trainer.precision=fp32", "trainer.precision=bf16"


def _settings() -> Iterator[tuple[str, Case]]:
    """Named cases; the names are what the table shows."""
    for precision in (FP32, BF16):
        kind = precision.rpartition("=")[2]
        for change in (
            "trainer.activation_checkpointing=off", "trainer.activation_checkpointing=full", "trainer.activation_checkpointing=every_2",
            "data.mask_documents=true", "model.num_key_value_heads=2", "trainer.global_batch_size=8", "optimizer=lora",
        ):  # fmt: skip
            optimizer = () if change == "optimizer=lora" else ("optimizer=adamw",)
            yield (
                f"{ACTIVATIONS}, {kind}, {change}",
                _case(ACTIVATIONS, precision, *optimizer, change, in_tests=(kind, change) in TESTED_CHANGES),
            )
        for optimizer in ("adamw", "galore", "natural_galore"):
            for apply in ("whole", "deferred", "immediate"):
                tested = (optimizer, apply, kind) in TESTED
                yield (
                    f"{UPDATES}, {kind}, {optimizer}, {apply}",
                    _case(UPDATES, precision, f"optimizer={optimizer}", f"optimizer.apply={apply}", in_tests=tested),
                )
            name = f"{UPDATES}, {kind}, {optimizer}, deferred, 2 micro-batches"
            yield (
                name,
                _case(
                    UPDATES,
                    precision,
                    f"optimizer={optimizer}",
                    "trainer.global_batch_size=4",
                    in_tests=(kind, optimizer) == ("bf16", "natural_galore"),
                ),
            )
            yield f"{LOGITS}, {kind}, {optimizer}", _case(LOGITS, precision, f"optimizer={optimizer}")
        yield f"{LOGITS}, {kind}, tied head", _case(LOGITS, precision, "optimizer=adamw", "model.tie_word_embeddings=true")
        chunks = f"{LOGITS}, {kind}, chunks of 50"
        yield chunks, _case(LOGITS, precision, "optimizer=galore", "trainer.loss_chunk_tokens=50")
    for change in ("fisher=factored", "fisher=history", "state_dtype=8bit", "state_dtype=bf16", "embeddings=true"):
        yield f"{UPDATES}, bf16, natural_galore, {change}", _case(UPDATES, BF16, "optimizer=natural_galore", f"optimizer.{change}")


TESTED = {
    ("adamw", "whole", "fp32"), ("adamw", "immediate", "bf16"), ("galore", "deferred", "fp32"), ("galore", "whole", "bf16"),
    ("natural_galore", "deferred", "bf16"), ("natural_galore", "immediate", "fp32"),
}  # fmt: skip
TESTED_CHANGES = {("fp32", "trainer.activation_checkpointing=full"), ("bf16", "trainer.activation_checkpointing=every_2")}
SETTINGS = dict(_settings())


def measured_peak(config: RunConfig, device: torch.device, *, num_steps: int = STEPS) -> int:
    """The most bytes allocated at one time while the engine of a run is built and takes `num_steps` updates; on this rank."""
    ranks = Collectives()
    loader = build.open_train_loader(config, None, Ranks(ranks.rank, ranks.size, ranks.rank))
    micro_batches = config.trainer.global_batch_size // (config.trainer.micro_batch_size * ranks.size)
    steps = [[next(loader) for _ in range(micro_batches)] for _ in range(num_steps)]
    loader.close()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        _train(config, device, steps)
        return peak_on_gpu(device)
    with AllocatedBytes() as count:
        _train(config, device, steps)
    return count.peak


def _train(config: RunConfig, device: torch.device, steps: list[list[Batch]]) -> None:
    engine: Engine = build.build_engine(config, device)
    for batches in steps:
        divisor = float(sum(batch.num_label_tokens for batch in batches)) * Collectives().size
        engine.begin_update(lr_multiplier=1.0, loss_divisor=divisor, num_micro_batches=len(batches))
        losses = [engine.accumulate({name: value.clone() for name, value in batch.model_inputs().items()}) for batch in batches]
        engine.finish_update(torch.stack(losses).sum() / divisor)
    engine.close()


def table(device: torch.device, names: list[str]) -> Iterator[str]:
    """A row for each case, MiB, and the largest difference."""
    yield "| settings | measured, MiB | planned | difference | peak at |"
    yield "|---|---|---|---|---|"
    largest = 0.0
    for name in names:
        config = compose_run(["data=synthetic", *SETTINGS[name].overrides], check_files=False)
        measured = measured_peak(config, device)
        peak = estimate_memory(config, on_gpu=device.type == "cuda").peak
        difference = peak.total / measured - 1
        largest = max(largest, abs(difference))
        yield f"| {name} | {measured / 2**20:.2f} | {peak.total / 2**20:.2f} | {difference:+.1%} | {peak.name} |"
    yield f"\nlargest difference: {largest:.1%} of {len(names)} settings"


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_accuracy", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there is one)"
    )
    parser.add_argument("--only", default="", help="only settings whose names contain this")
    options = parser.parse_args(argv)
    for line in table(torch.device(options.device), [name for name in SETTINGS if options.only in name]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
