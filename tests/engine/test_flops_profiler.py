"""DeepSpeed's flops profiler reports through our engine, on rank 0, and changes nothing."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ngpt.config.schema import ModelConfig
from ngpt.dist.collectives import Collectives
from ngpt.engine.deepspeed_config import deepspeed_config
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import NaturalGaLore, low_rank_groups

SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_seq_len": 16}


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(ModelConfig(**SHAPE))


def build_optimizer(model: Any, sharding: Any) -> NaturalGaLore:
    return NaturalGaLore(low_rank_groups(model, rank=4, shape_of=sharding.shape), lr=0.01, fisher="diagonal", sharding=sharding)


def losses_of(stage: int, options: dict[str, Any]) -> list[float]:
    from ngpt.engine.deepspeed_engine import ZeroEngine

    ranks = Collectives()
    config = deepspeed_config(options, zero_stage=stage, micro_batch_size=2, accumulation_steps=2, world_size=ranks.size)
    keywords: Any = {"device": torch.device("cpu"), "dtype": torch.float32, "apply": "deferred", "grad_clip": 0.0}
    engine = ZeroEngine(build_model, functools.partial(build_optimizer), config, zero_stage=stage, **keywords)
    losses = []
    for step in range(4):
        rows = torch.randint(0, SHAPE["vocab_size"], (8, 9), generator=torch.Generator().manual_seed(step)).chunk(ranks.size)[ranks.rank]
        engine.begin_update(lr_multiplier=1.0, loss_divisor=64.0, num_micro_batches=2)
        loss = sum((engine.accumulate({"input_ids": own[:, :-1], "labels": own[:, 1:]}) for own in rows.chunk(2)), torch.zeros(()))
        losses.append(engine.finish_update(loss / 64.0).loss)
    engine.close()
    return losses


def with_and_without(stage: int, file: str) -> tuple[list[float], list[float]]:
    profiled = losses_of(stage, {"flops_profiler": {"enabled": True, "profile_step": 2, "output_file": file}})
    return profiled, losses_of(stage, {})


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3)])
def test_the_flops_profiler_writes_its_report_and_changes_nothing(on_ranks, tmp_path: Path, ranks, stage):
    file = tmp_path / "flops.txt"
    for profiled, plain in on_ranks(ranks, with_and_without, stage, str(file)):
        assert profiled == plain
    report = file.read_text()
    parameters = sum(p.numel() for p in build_model().parameters())
    assert "DeepSpeed Flops Profiler" in report
    assert "Profile Summary at step 3" in report  # profile_step counts from 0
    assert f"{parameters / 1000:.2f}".rstrip("0").rstrip(".") + " K" in report
    assert "fwd flops per GPU" in report
