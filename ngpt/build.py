"""From settings to parts: the one place where the configuration meets data, model, optimizer and engine, which take plain arguments."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ngpt.config.optimizers import (
    AdamWConfig,
    AdaRankGradConfig,
    GaLoreConfig,
    LoRAConfig,
    LowRankConfig,
    NaturalGaLoreConfig,
    OptimizerConfig,
    ReLoRAConfig,
)
from ngpt.config.precision import ROUNDING
from ngpt.config.problems import ConfigError
from ngpt.config.schema import (
    ConstantSchedulerConfig,
    CosineSchedulerConfig,
    EngineConfig,
    LinearSchedulerConfig,
    RunConfig,
    SchedulerConfig,
    TrainerConfig,
    WSDSchedulerConfig,
    checkpointing_interval,
    engine_of_launch,
    warmup_steps_in_run,
)
from ngpt.data.batch import Batch
from ngpt.data.loader import build_eval_batches, build_train_loader
from ngpt.data.tokenizer import Tokenizer
from ngpt.data.train_loader import TrainLoader
from ngpt.dist.collectives import Collectives
from ngpt.dist.process_group import Ranks, seed_everything
from ngpt.engine.base import Engine
from ngpt.engine.deepspeed_config import deepspeed_config
from ngpt.engine.deepspeed_contract import UnknownDeepSpeed, check_deepspeed
from ngpt.engine.local import LocalEngine, weight_dtype
from ngpt.model import lora
from ngpt.model.llama import LlamaForCausalLM, compile_blocks
from ngpt.optim import AdamW, AdaRankGrad, GaLore, NaturalGaLore, low_rank_groups, lr_schedule
from ngpt.optim.low_rank import LowRankAdamW
from ngpt.optim.relora import ReLoRA
from ngpt.optim.sharding import WHOLE, Sharding

_LOW_RANK: dict[type[LowRankConfig], type[LowRankAdamW]] = {
    GaLoreConfig: GaLore,
    NaturalGaLoreConfig: NaturalGaLore,
    AdaRankGradConfig: AdaRankGrad,
}


def open_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The run's tokenizer, or None where the data needs none."""
    return None if config.tokenizer.path is None else Tokenizer.load(config.tokenizer.path)


def open_train_loader(config: RunConfig, tokenizer: Tokenizer | None, ranks: Ranks, *, pin_memory: bool = False) -> TrainLoader:
    """The training batches of this rank from their start."""
    return build_train_loader(
        config.data,
        tokenizer,
        ranks=ranks,
        global_batch_size=config.trainer.global_batch_size,
        pin_memory=pin_memory,
        **_row_settings(config),
    )


def read_eval_batches(config: RunConfig, tokenizer: Tokenizer | None, ranks: Ranks) -> list[Batch]:
    """The held-out batches of this rank, the same ones every time."""
    return build_eval_batches(config.data, tokenizer, ranks=ranks, max_tokens=config.eval.max_tokens, **_row_settings(config))


def _row_settings(config: RunConfig) -> dict[str, int]:
    """What rows of tokens look like, for training and for evaluation."""
    return {
        "vocab_size": config.model.vocab_size,
        "seq_len": config.trainer.seq_len,
        "micro_batch_size": config.trainer.micro_batch_size,
        "seed": config.seed,
    }


def build_model(config: RunConfig) -> LlamaForCausalLM:
    """The model with the initial weights of `config.seed`, in fp32 on the CPU."""
    trainer = config.trainer
    seed_everything(config.seed)  # here, so that nothing that was opened before can move the initial weights
    model = LlamaForCausalLM(config.model, loss_chunk_tokens=trainer.loss_chunk_tokens, checkpoint_every=checkpointing_interval(trainer))
    if isinstance(config.optimizer, LoRAConfig):  # after the model's own weights, which are those of any other optimizer
        lora.add_adapters(model, rank=config.optimizer.rank, alpha=config.optimizer.lora_alpha)
    if trainer.compile:
        compile_blocks(model)
    return model


def build_engine(config: RunConfig, device: torch.device) -> Engine:
    """The engine with a new model and a new optimizer on `device`; over all ranks of the process group, if one was started.

    Raises ConfigError for options of DeepSpeed that cannot be passed on, before anything is built, and for a DeepSpeed that is unknown.
    """
    precision = config.trainer.precision
    parts = (
        functools.partial(build_model, config),
        functools.partial(build_optimizer, config=config.optimizer, precision=precision, seed=config.seed),
    )
    shared = {
        "device": device,
        "dtype": weight_dtype(precision),
        "apply": config.optimizer.apply,
        "grad_clip": config.trainer.grad_clip,
    }
    world_size = Collectives().size
    if engine_of_launch(config.engine, world_size) == "local":
        return LocalEngine(*parts, **shared)
    return _build_zero_engine(config.engine, config.trainer, parts, shared, world_size)


def _build_zero_engine(
    engine: EngineConfig, trainer: TrainerConfig, parts: tuple[Callable, Callable], shared: dict[str, Any], world_size: int
) -> Engine:
    options = deepspeed_config(
        engine.deepspeed,
        zero_stage=engine.zero_stage,
        micro_batch_size=trainer.micro_batch_size,
        accumulation_steps=trainer.global_batch_size // (trainer.micro_batch_size * world_size),
        world_size=world_size,
    )
    # DeepSpeed is imported here, as runs on one process need none of it. It settles on a kind of device while it is imported.
    os.environ.setdefault("DS_ACCELERATOR", shared["device"].type)
    try:
        check_deepspeed()
    except UnknownDeepSpeed as error:
        raise ConfigError([str(error)]) from error
    from ngpt.engine.deepspeed_engine import ZeroEngine

    return ZeroEngine(
        *parts,
        options,
        **shared,
        zero_stage=engine.zero_stage,
        offload_optimizer=engine.offload_optimizer,
        communication_dtype={"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[engine.communication_dtype],
    )


def build_optimizer(model: nn.Module, sharding: Sharding = WHOLE, *, config: OptimizerConfig, precision: str, seed: int) -> AdamW:
    """The optimizer that `config` asks for, over all trainable parameters of `model`.

    Args:
        sharding: which part of parameters and state this process has.
        precision: `trainer.precision`; says how bf16 weights are rounded.
        seed: of random bases and of stochastic rounding.
    """
    shared = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "state_dtype": config.state_dtype,
        "rounding": ROUNDING[precision],
        "seed": seed,
        "sharding": sharding,
    }
    if isinstance(config, AdamWConfig):
        return AdamW(model.named_parameters(), **shared)
    if isinstance(config, LoRAConfig):
        return _build_lora(model, config, shared)
    assert isinstance(config, LowRankConfig)
    of_groups = {name: getattr(config, name) for name in ("rank", "update_proj_gap", "scale", "embeddings")}
    groups = low_rank_groups(model, shape_of=sharding.shape, **of_groups)
    own = {field.name for field in dataclasses.fields(config)} - {field.name for field in dataclasses.fields(OptimizerConfig)}
    options = {name: getattr(config, name) for name in own - of_groups.keys()}  # settings and arguments share names
    return _LOW_RANK[type(config)](groups, **shared, **options)


def _build_lora(model: nn.Module, config: LoRAConfig, shared: dict[str, Any]) -> AdamW:
    """AdamW or ReLoRA over adapters, embedding, head and norms; the adapted matrices themselves are frozen."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not isinstance(config, ReLoRAConfig):
        return AdamW(trainable, **shared)
    return ReLoRA(
        trainable,
        **shared,
        adapters=[adapter for _, adapter in lora.adapters(model)],
        scale=config.lora_alpha / config.rank,
        merge_every=config.merge_every,
        restart_warmup=config.restart_warmup_steps,
        prune=config.prune,
    )


def build_schedule(config: SchedulerConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate for update number `step`, counted from 0."""
    warmup = warmup_steps_in_run(config, total_steps)
    match config:
        case CosineSchedulerConfig():
            return functools.partial(lr_schedule.cosine, total_steps=total_steps, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio)
        case LinearSchedulerConfig():
            return functools.partial(lr_schedule.linear, total_steps=total_steps, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio)
        case WSDSchedulerConfig():
            return functools.partial(
                lr_schedule.wsd,
                total_steps=total_steps,
                warmup_steps=warmup,
                decay_fraction=config.decay_fraction,
                min_lr_ratio=config.min_lr_ratio,
            )
        case ConstantSchedulerConfig():
            return functools.partial(lr_schedule.constant, warmup_steps=warmup)
    raise TypeError(f"no schedule for {type(config).__name__}")
