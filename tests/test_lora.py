"""LoRA and ReLoRA as a run builds them: model, optimizer and engine together, and what a checkpoint's weights are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ngpt.build import build_engine, build_model, build_optimizer
from ngpt.config.compose import compose_run
from ngpt.model.lora import merged_weights
from ngpt.optim import AdamW
from ngpt.optim.relora import ReLoRA

TINY = [
    *("model=llama_9m", "model.vocab_size=64", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=2"),
    *("model.num_attention_heads=2", "data=synthetic", "trainer.max_steps=8", "trainer.precision=fp32"),
]
LORA = [*TINY, "optimizer=lora", "optimizer.rank=4", "optimizer.lora_alpha=8"]
RELORA = [*TINY, "optimizer=relora", "optimizer.rank=4", "optimizer.lora_alpha=8", "optimizer.merge_every=2"]
RELORA += ["optimizer.restart_warmup_steps=1"]
IN_ADAPTERS = 2 * 4 * (4 * (16 + 16) + 3 * (16 + 24))
IN_MATRICES = 2 * (4 * 16 * 16 + 3 * 16 * 24)
ALL_ELSE = 2 * 64 * 16 + 5 * 16


def update(engine, index):
    tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(index))
    inputs = {"input_ids": tokens, "labels": tokens.roll(-1, 1)}
    engine.begin_update(lr_multiplier=1.0, loss_divisor=48.0, num_micro_batches=1)
    return engine.finish_update(engine.accumulate(inputs) / 48.0)


@pytest.mark.parametrize(("overrides", "kind"), [(LORA, AdamW), (RELORA, ReLoRA)])
@pytest.mark.parametrize(("precision", "weight_size", "master_size"), [("fp32", 4, 0), ("bf16", 2, 0), ("bf16_master", 2, 4)])
def test_memory_counts_every_weight_and_state_of_the_trainable_ones_alone(overrides, kind, precision, weight_size, master_size):
    config = compose_run([*overrides, f"trainer.precision={precision}"])
    engine = build_engine(config, torch.device("cpu"))
    assert type(engine.optimizer) is kind
    trainable, sizes = IN_ADAPTERS + ALL_ELSE, engine.state_bytes()
    assert sizes["weights"] == weight_size * (IN_MATRICES + trainable)
    assert sizes["moments"] == 8 * trainable
    assert sizes["master"] == master_size * trainable
    assert sizes["optimizer_state"] == sizes["moments"] + sizes["master"] + sizes["other"]
    update(engine, 0)
    assert engine.state_bytes() == sizes


@pytest.mark.parametrize("apply", ["whole", "deferred", "immediate"])
def test_gradients_are_those_of_the_trainable_weights(apply):
    one_micro_batch = ["trainer.global_batch_size=4", "trainer.micro_batch_size=4"]
    engine = build_engine(compose_run([*RELORA, *one_micro_batch, f"optimizer.apply={apply}"]), torch.device("cpu"))
    outcome = update(engine, 0)
    assert outcome.applied
    assert outcome.gradient_bytes == (0 if apply == "immediate" else 4 * (IN_ADAPTERS + ALL_ELSE))


def test_the_first_loss_is_that_of_every_other_optimizer_of_the_seed():
    losses = [update(build_engine(compose_run(overrides), torch.device("cpu")), 0).loss for overrides in (LORA, [*TINY, "optimizer=adamw"])]
    assert losses[0] == losses[1]


def test_the_weights_of_a_run_become_those_of_a_plain_model():
    config = compose_run(RELORA)
    engine = build_engine(config, torch.device("cpu"))
    first = {name: weight.clone() for name, weight in engine.weights()}
    for index in range(3):  # a merge after the second
        update(engine, index)
    assert all(not torch.equal(first[name], weight) for name, weight in engine.weights())
    plain = build_model(dataclasses.replace(config, optimizer=compose_run([*TINY, "optimizer=adamw"]).optimizer))
    plain.load_state_dict(merged_weights(dict(engine.weights()), alpha=config.optimizer.lora_alpha))
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(plain(tokens), engine.model(tokens), rtol=1e-4, atol=1e-5)


def test_the_adapters_rank_may_reach_the_shortest_matrix_but_one():
    config = compose_run([*RELORA, "optimizer.rank=15"])
    assert build_optimizer(build_model(config), config=config.optimizer, precision="fp32", seed=0)
