"""Every rule that a configuration must obey, checked in one pass before torch is imported, each problem with its remedy.

Rules for a single value are metadata of the schema's fields; rules between values are the functions below, each skipped
where a value that it reads already breaks its own rule; rules about files are in `file_rules`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from ngpt.config.engine_rules import engine_problems
from ngpt.config.file_rules import file_problems
from ngpt.config.optimizers import AdaRankGradConfig, GaLoreConfig, LoRAConfig, LowRankConfig, NaturalGaLoreConfig, ReLoRAConfig
from ngpt.config.problems import ConfigError, problem, shown
from ngpt.config.schema import (
    C4DataConfig,
    RunConfig,
    WSDSchedulerConfig,
    checkpointing_interval,
    decay_steps_in_run,
    engine_of_launch,
    steps_in_run,
    warmup_steps_in_run,
)
from ngpt.config.shapes import block_matrices
from ngpt.config.suggest import nearest


def validate(config: RunConfig, *, world_size: int = 1, check_files: bool = True) -> None:
    """Raise one ConfigError that lists every problem of `config` on `world_size` processes.

    `check_files=False` opens and looks for no file, for plans about another machine. Nothing is changed.
    """
    single = dict(_single_value_problems(config))
    problems = list(single.values())
    for reads, rule in _RULES:
        if single.keys().isdisjoint(reads):
            problems += rule(config, world_size)
    if check_files:
        problems += file_problems(config)
    if problems:
        raise ConfigError(problems)


# ------------------------------------------------------------------------------------------------------ single values
_LARGEST_WHOLE_NUMBER = 2**63 - 1  # what torch can count to
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _single_value_problems(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, line) of every value that breaks the rule in its field's metadata."""
    for field in dataclasses.fields(section):
        path, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _single_value_problems(value, f"{path}.")
        elif isinstance(value, str) and value not in field.metadata.get("choices", (value,)):
            yield path, _choice_problem(path, value, field.metadata["choices"])
        elif isinstance(value, int | float) and not isinstance(value, bool) and (rule := _broken_bound(value, field)):
            fix = f"the default is {shown(field.default)}" if isinstance(field.default, int | float) else "correct it or leave it out"
            yield path, problem(path, value, rule, fix)


def _choice_problem(path: str, value: str, choices: tuple[str, ...]) -> str:
    section, _, name = path.rpartition(".")
    if name == "name":
        return problem(path, value, f"only repeats the choice of the group, {' or '.join(choices)}", f"choose with {section}={value}")
    guess = nearest(value, choices)
    fix = f"did you mean {path}={guess}?" if guess else f"set {path}={choices[0]}"
    return problem(path, value, f"must be one of {', '.join(choices)}", fix)


def _broken_bound(value: float, field: dataclasses.Field[Any]) -> str:
    """The rule that `value` breaks, empty where it breaks none."""
    bounds = {bound: field.metadata[bound] for bound in _BOUNDS if bound in field.metadata}
    countable = abs(value) <= _LARGEST_WHOLE_NUMBER if isinstance(value, int) else math.isfinite(value)
    if countable and all(_BOUNDS[bound][1](value, limit) for bound, limit in bounds.items()):
        return ""
    words = [f"{_BOUNDS[bound][0]} {limit}" for bound, limit in bounds.items()]
    if not countable:
        words = [*words, f"at most {_LARGEST_WHOLE_NUMBER}"] if isinstance(value, int) else ["finite", *words]
    return "must be " + " and ".join(words)


# ------------------------------------------------------------------------------------------------------ between values
Rule = Callable[[RunConfig, int], Iterator[str]]
_RULES: list[tuple[tuple[str, ...], Rule]] = []


def _rule(*reads: str) -> Callable[[Rule], Rule]:
    """Register a rule that makes sense only where the values at the paths `reads` are valid by themselves."""

    def register(rule: Rule) -> Rule:
        _RULES.append((reads, rule))
        return rule

    return register


@_rule("model.hidden_size", "model.num_attention_heads", "model.num_key_value_heads")
def _heads(config: RunConfig, world_size: int) -> Iterator[str]:
    hidden, heads = config.model.hidden_size, config.model.num_attention_heads
    if hidden % heads:
        fix = f"set model.hidden_size={_multiples_near(hidden, 2 * heads)}, or model.num_attention_heads={_divisors_near(hidden, heads)}"
        yield problem("model.hidden_size", hidden, f"must be a multiple of num_attention_heads = {heads}", fix)
    elif hidden // heads % 2:
        rule = f"must give every head an even width (rotary embeddings turn pairs), {heads} heads are {hidden // heads} wide"
        yield problem("model.hidden_size", hidden, rule, f"set model.hidden_size={_multiples_near(hidden, 2 * heads)}")
    key_value_heads = config.model.num_key_value_heads or heads
    if heads % key_value_heads:
        fix = f"set model.num_key_value_heads={_divisors_near(heads, key_value_heads)}"
        yield problem("model.num_key_value_heads", key_value_heads, f"must divide num_attention_heads = {heads}", fix)


@_rule("trainer.seq_len", "model.max_seq_len")
def _sequence_length(config: RunConfig, world_size: int) -> Iterator[str]:
    seq_len, longest = config.trainer.seq_len, config.model.max_seq_len
    if seq_len > longest:
        fix = f"set trainer.seq_len={longest} or model.max_seq_len={seq_len}"
        yield problem("trainer.seq_len", seq_len, f"must be at most model.max_seq_len = {longest}", fix)
    if seq_len == 1 and config.data.packing == "pad":
        rule = "must be at least 2 with data.packing=pad, where the last position of a row predicts nothing"
        yield problem("trainer.seq_len", seq_len, rule, "set trainer.seq_len=256")


@_rule("trainer.max_steps", "trainer.max_tokens")
def _length_of_run(config: RunConfig, world_size: int) -> Iterator[str]:
    steps, tokens = config.trainer.max_steps, config.trainer.max_tokens
    if steps is None and tokens is None:
        rule = "one of trainer.max_steps and trainer.max_tokens must be given"
        yield problem("trainer.max_steps", steps, rule, "set trainer.max_steps=10000")
    elif steps is not None and tokens is not None:
        rule = f"only one of trainer.max_steps and trainer.max_tokens = {tokens} may be given"
        yield problem("trainer.max_steps", steps, rule, "set one of them to null")


@_rule(*("trainer.max_steps", "trainer.max_tokens", "trainer.global_batch_size", "trainer.seq_len", "trainer.profile_at"))
def _the_profile_ends_before_the_run(config: RunConfig, world_size: int) -> Iterator[str]:
    first, trainer = config.trainer.profile_at, config.trainer
    if first is None or (trainer.max_steps is None) == (trainer.max_tokens is None):
        return
    steps = steps_in_run(trainer)
    if first + trainer.profile_steps - 1 > steps:
        rule = f"its {trainer.profile_steps} steps must be among the {steps} of the run"
        yield problem("trainer.profile_at", first, rule, f"set trainer.profile_at={max(1, steps - trainer.profile_steps + 1)}, or null")


@_rule("trainer.global_batch_size", "trainer.micro_batch_size")
def _batch_arithmetic(config: RunConfig, world_size: int) -> Iterator[str]:
    rows, micro = config.trainer.global_batch_size, config.trainer.micro_batch_size
    if rows % (micro * world_size) == 0:
        return
    rule = f"must be a multiple of micro_batch_size * processes = {micro} * {world_size}"
    fix = f"set trainer.global_batch_size={_multiples_near(rows, micro * world_size)}"
    if rows % world_size == 0:
        fix += f", or trainer.micro_batch_size={_divisors_near(rows // world_size, micro)}"
    yield problem("trainer.global_batch_size", rows, rule, fix)


@_rule("model.num_hidden_layers")
def _activation_checkpointing(config: RunConfig, world_size: int) -> Iterator[str]:
    path, policy, blocks = "trainer.activation_checkpointing", config.trainer.activation_checkpointing, config.model.num_hidden_layers
    try:
        interval = checkpointing_interval(config.trainer)
    except ValueError:
        yield problem(path, policy, "must be off, full or every_K with K >= 1", f"set {path}=every_2")
    else:
        if interval > blocks:
            yield problem(path, policy, f"recomputes nothing, the model has {blocks} blocks", f"set {path}=off or full")


@_rule("optimizer.rank", "model.hidden_size", "model.intermediate_size", "model.num_attention_heads", "model.num_key_value_heads")
def _rank(config: RunConfig, world_size: int) -> Iterator[str]:
    if not isinstance(config.optimizer, LowRankConfig | LoRAConfig):
        return
    rank, model = config.optimizer.rank, config.model
    key_value = model.hidden_size // model.num_attention_heads * (model.num_key_value_heads or model.num_attention_heads)
    matrices = block_matrices(hidden=model.hidden_size, inner=model.intermediate_size, key_value=key_value)
    path, (rows, columns) = min(matrices.items(), key=lambda item: min(item[1]))
    short, name = min(rows, columns), path.rpartition(".")[2]
    if rank >= short:
        which = "adapted" if isinstance(config.optimizer, LoRAConfig) else "projected"
        rule = f"must be below the short side of every {which} matrix; {name} of model={model.name} is {rows} x {columns}"
        fix = f"set optimizer.rank={max(1, short // 4)} (a quarter is usual, {short - 1} the largest)"
        yield problem("optimizer.rank", rank, rule, fix if short > 1 else "use optimizer=adamw")


@_rule()
def _betas(config: RunConfig, world_size: int) -> Iterator[str]:
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield problem("optimizer.betas", betas, "must be two numbers, each at least 0 and below 1", "set optimizer.betas='[0.9,0.999]'")


@_rule("trainer.global_batch_size", "trainer.micro_batch_size", "trainer.grad_clip")
def _immediate_updates(config: RunConfig, world_size: int) -> Iterator[str]:
    path, trainer = "optimizer.apply", config.trainer
    if config.optimizer.apply != "immediate":
        return
    micro_batches = trainer.global_batch_size / (trainer.micro_batch_size * world_size)
    if micro_batches > 1:
        rule = f"changes weights inside backward, so an update must be one micro-batch, here it is {micro_batches:g}"
        fix = f"set {path}=deferred, or trainer.micro_batch_size={trainer.global_batch_size // world_size}"
        yield problem(path, "immediate", rule, fix)
    if trainer.grad_clip > 0:
        rule = f"cannot clip by the global norm, no gradient waits for the others (trainer.grad_clip = {trainer.grad_clip})"
        yield problem(path, "immediate", rule, f"set {path}=deferred or trainer.grad_clip=0")


@_rule("trainer.on_spike")
def _loss_spikes(config: RunConfig, world_size: int) -> Iterator[str]:
    on_spike = config.trainer.on_spike
    if on_spike == "skip" and config.optimizer.apply == "immediate":
        rule = "cannot drop an update that optimizer.apply=immediate has made inside backward"
        yield problem("trainer.on_spike", on_spike, rule, "set trainer.on_spike=log or rollback, or optimizer.apply=deferred")
    if on_spike == "rollback" and not config.checkpoint.every_steps:
        rule = "needs a checkpoint to go back to, and checkpoint.every_steps = 0 writes none on the way"
        yield problem("trainer.on_spike", on_spike, rule, "set checkpoint.every_steps=1000")


@_rule("optimizer.update_proj_gap")
def _stagger(config: RunConfig, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if isinstance(optimizer, LowRankConfig) and optimizer.stagger and optimizer.update_proj_gap == 1:
        rule = "has nothing to spread with update_proj_gap = 1, where every step refreshes every matrix"
        yield problem("optimizer.stagger", True, rule, "set optimizer.stagger=false or a larger optimizer.update_proj_gap")


@_rule("optimizer.fisher", "optimizer.history", "optimizer.moments", "optimizer.complement", "optimizer.proj_type")
def _parts(config: RunConfig, world_size: int) -> Iterator[str]:
    """What the library would refuse when it is built: parts of a low-rank optimizer that do not go together."""
    optimizer = config.optimizer
    if not isinstance(optimizer, LowRankConfig):
        return
    fisher = optimizer.fisher if isinstance(optimizer, NaturalGaLoreConfig) else "none"
    two_sided = fisher == "two_sided" or (isinstance(optimizer, GaLoreConfig) and optimizer.proj_type == "full")
    moments, complement = optimizer.moments, optimizer.complement
    if isinstance(optimizer, NaturalGaLoreConfig) and optimizer.history is not None and fisher not in ("history", "two_sided"):
        rule = f"is kept by fisher=history and fisher=two_sided alone; here fisher={fisher}"
        yield problem("optimizer.history", optimizer.history, rule, "set optimizer.fisher=history or remove optimizer.history")
    if fisher == "diagonal" and moments not in (None, "momentum"):
        rule = "does not go with fisher=diagonal, which takes the place of the second moment"
        yield problem("optimizer.moments", moments, rule, "set optimizer.moments=momentum")
    if fisher == "diagonal" and complement == "fira":
        rule = "does not go with fisher=diagonal, which scales what the projection dropped itself"
        yield problem("optimizer.complement", complement, rule, "set optimizer.complement=raw or none")
    if fisher != "diagonal" and complement == "raw":
        rule = f"goes with fisher=diagonal alone, which scales it; here fisher={fisher}"
        yield problem("optimizer.complement", complement, rule, f"set optimizer.complement={'none' if two_sided else 'fira or none'}")
    if two_sided and complement == "fira":
        yield problem("optimizer.complement", complement, "cannot be added where both sides are projected", "set optimizer.complement=none")


@_rule("optimizer.rank", "model.vocab_size")
def _embeddings(config: RunConfig, world_size: int) -> Iterator[str]:
    optimizer, tokens = config.optimizer, config.model.vocab_size
    if isinstance(optimizer, LowRankConfig) and optimizer.embeddings and tokens <= optimizer.rank:
        rule = f"has nothing to project where model.vocab_size = {tokens} is not above optimizer.rank = {optimizer.rank}"
        yield problem("optimizer.embeddings", True, rule, "set optimizer.embeddings=false or a smaller optimizer.rank")


@_rule("optimizer.min_rank", "optimizer.rank", "optimizer.on_refresh")
def _rank_range(config: RunConfig, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if isinstance(optimizer, AdaRankGradConfig) and optimizer.min_rank > optimizer.rank:
        rule = f"must not be above the largest rank, optimizer.rank = {optimizer.rank}"
        yield problem("optimizer.min_rank", optimizer.min_rank, rule, f"set optimizer.min_rank={optimizer.rank} or lower")
    if isinstance(optimizer, AdaRankGradConfig) and optimizer.on_refresh == "keep":
        rule = "cannot keep moments of one rank at another, and the rank of optimizer=adarankgrad adapts"
        yield problem("optimizer.on_refresh", "keep", rule, "set optimizer.on_refresh=rotate or reset")


@_rule("optimizer.merge_every", "optimizer.restart_warmup_steps")
def _merges(config: RunConfig, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if isinstance(optimizer, ReLoRAConfig) and optimizer.restart_warmup_steps >= optimizer.merge_every:
        rule = f"must be below merge_every = {optimizer.merge_every}, or the learning rate never gets back to the schedule's"
        fix = f"set optimizer.restart_warmup_steps={optimizer.merge_every // 10}"
        yield problem("optimizer.restart_warmup_steps", optimizer.restart_warmup_steps, rule, fix)


@_rule(
    *("trainer.max_steps", "trainer.max_tokens", "trainer.global_batch_size", "trainer.seq_len"),
    *("scheduler.warmup_steps", "scheduler.warmup_fraction", "scheduler.decay_fraction"),
)
def _schedule(config: RunConfig, world_size: int) -> Iterator[str]:
    trainer, scheduler = config.trainer, config.scheduler
    if (trainer.max_steps is None) == (trainer.max_tokens is None):
        return  # `_length_of_run` has said so
    steps = steps_in_run(trainer)
    warmup = warmup_steps_in_run(scheduler, steps)
    if warmup >= steps:
        name = "warmup_fraction" if scheduler.warmup_steps is None else "warmup_steps"
        fix = f"set scheduler.warmup_steps={steps // 10}"
        yield problem(f"scheduler.{name}", getattr(scheduler, name), f"must leave steps after the warm-up, the run has {steps}", fix)
    elif isinstance(scheduler, WSDSchedulerConfig) and warmup + (decay := decay_steps_in_run(scheduler, steps)) > steps:
        rule = f"must leave room for the warm-up, {warmup} + {decay} steps are more than the {steps} of the run"
        fix = f"set scheduler.decay_fraction={math.floor((steps - warmup) / steps * 100) / 100} or less, or a shorter warm-up"
        yield problem("scheduler.decay_fraction", scheduler.decay_fraction, rule, fix)


@_rule("data.packing")
def _document_masks(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.data.mask_documents and config.data.packing != "pack":
        rule = "needs data.packing=pack, a padded row holds one document only"
        yield problem("data.mask_documents", True, rule, "set data.mask_documents=false or data.packing=pack")


@_rule("eval.every_steps")
def _held_out(config: RunConfig, world_size: int) -> Iterator[str]:
    data, evaluates = config.data, config.eval.every_steps > 0 or config.eval.at_end
    if evaluates and isinstance(data, C4DataConfig) and data.val_split == data.train_split:
        rule = "must differ from data.train_split, or the model is judged by text that it was trained on"
        yield problem("data.val_split", data.val_split, rule, "set data.val_split=validation")


@_rule("engine.name", "engine.zero_stage")
def _samples(config: RunConfig, world_size: int) -> Iterator[str]:
    prompts, path = config.eval.sample_prompts, "eval.sample_prompts"
    if not prompts:
        return
    if config.data.name == "synthetic" or config.tokenizer.path is None:
        yield problem(path, prompts, "needs text and its tokenizer, data=synthetic has none", f"set {path}=[]")
    if engine_of_launch(config.engine, world_size) == "deepspeed" and config.engine.zero_stage == 3:
        rule = "needs all weights on one process, and engine.zero_stage = 3 divides them"
        yield problem(path, prompts, rule, f"set {path}=[], and use python -m ngpt.generate on the checkpoints")


@_rule("engine.name", "engine.zero_stage", "optimizer.apply", "optimizer.fisher", "optimizer.complement")
def _engine(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from engine_problems(config, world_size)


@_rule()
def _run_folder(config: RunConfig, world_size: int) -> Iterator[str]:
    name = config.run.name
    if not name.strip() or name.startswith(".") or any(character in "/\\" or not character.isprintable() for character in name):
        fix = name.replace("\\", "/").rpartition("/")[2].lstrip(".") or "my-run"
        rule = "must be the name of one visible folder, without / and \\"
        yield problem("run.name", name, rule, f"set run.name={fix}; the folder above it is run.dir")
    if not config.run.dir.strip():
        yield problem("run.dir", config.run.dir, "must name a folder", "set run.dir=runs")


_DIVISORS_TRIED = 10_000


def _multiples_near(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple > 0)


def _divisors_near(value: int, wanted: int) -> str:
    """The divisors of `value` on both sides of `wanted`; at least 1, where none is near."""
    most = min(wanted, value)
    below = next((divisor for divisor in range(most, max(0, most - _DIVISORS_TRIED), -1) if value % divisor == 0), 1)
    above = next((divisor for divisor in range(wanted + 1, min(value, wanted + _DIVISORS_TRIED) + 1) if value % divisor == 0), None)
    return f"{below} or {above}" if above else str(below)
