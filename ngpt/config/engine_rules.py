"""Rules about engines: what several processes, the stages of ZeRO and forbidden full gradients leave possible."""

from __future__ import annotations

from collections.abc import Iterator

from ngpt.config.optimizers import AdamWConfig, LoRAConfig, LowRankConfig, NaturalGaLoreConfig, ReLoRAConfig
from ngpt.config.problems import problem
from ngpt.config.schema import RunConfig, engine_of_launch


def engine_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """A line for every problem of the engine of a launch of `world_size` processes."""
    if engine_of_launch(config.engine, world_size) == "local":
        yield from _local(config, world_size)
    else:
        yield from _deepspeed(config)
    yield from _full_gradients(config)


def _local(config: RunConfig, world_size: int) -> Iterator[str]:
    engine = config.engine
    if world_size > 1:
        rule = f"trains on one process, this launch has {world_size}"
        yield problem("engine.name", engine.name, rule, "set engine=auto, or start one: python -m ngpt.train ...")
        return
    for name in ("offload_optimizer", "deepspeed"):
        if getattr(engine, name):
            rule = f"is for engine=deepspeed; engine={engine.name} is local on one process"
            yield problem(f"engine.{name}", getattr(engine, name), rule, f"set engine=deepspeed or remove engine.{name}")


def _deepspeed(config: RunConfig) -> Iterator[str]:
    engine = config.engine
    if engine.zero_stage > 0 and isinstance(config.optimizer, ReLoRAConfig):
        rule = "divides the optimizer's state, and optimizer=relora needs all of it where it merges adapters and prunes their moments"
        yield problem("engine.zero_stage", engine.zero_stage, rule, "set engine.zero_stage=0 or optimizer=lora")
    if engine.zero_stage == 0 and engine.offload_optimizer:
        rule = "moves divided optimizer state, and engine.zero_stage = 0 divides nothing"
        yield problem("engine.offload_optimizer", True, rule, "set engine.zero_stage=1 or engine.offload_optimizer=false")


def _full_gradients(config: RunConfig) -> Iterator[str]:
    """With `forbid_full_gradients`: which setting keeps whole gradients of the blocks' matrices until the update.

    Adapters of LoRA are thin, and the matrices below them have no gradient. An immediate update frees each gradient in its turn.
    """
    optimizer = config.optimizer
    if not optimizer.forbid_full_gradients or isinstance(optimizer, LoRAConfig) or optimizer.apply == "immediate":
        return
    forbidden = "which optimizer.forbid_full_gradients refuses"
    if optimizer.apply == "whole":
        rule = f"keeps all gradients until the update, {forbidden}"
        yield problem("optimizer.apply", "whole", rule, "set optimizer.apply=deferred with a projecting optimizer, or immediate")
    elif isinstance(optimizer, AdamWConfig):
        rule = f"needs the gradients as they are, and apply=deferred keeps them until the update, {forbidden}"
        yield problem("optimizer.name", "adamw", rule, "set optimizer=galore or optimizer.apply=immediate")
    elif isinstance(optimizer, NaturalGaLoreConfig) and optimizer.fisher == "diagonal":
        rule = f"squares full gradients, and apply=deferred keeps them until the update, {forbidden}"
        yield problem("optimizer.fisher", "diagonal", rule, "set optimizer.fisher=factored or optimizer.apply=immediate")
    elif isinstance(optimizer, LowRankConfig) and optimizer.complement not in (None, "none"):
        rule = f"adds what the projection dropped, and apply=deferred keeps full gradients for it, {forbidden}"
        yield problem("optimizer.complement", optimizer.complement, rule, "set optimizer.complement=none or optimizer.apply=immediate")
