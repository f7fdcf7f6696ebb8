"""DeepSpeed's configuration from the trainer's own settings: the one source of truth, and which further options a user may give.

Every option of DeepSpeed is in one of four tables: what ngpt sets itself (with the setting to use instead), what does not go together
with its optimizers or engine (with the reason), what may be passed on as it is, and what is passed on at stage 3 alone. Anything else is
refused as unknown. This module imports neither torch nor DeepSpeed, so that options are checked before either is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ngpt.config.problems import ConfigError, problem
from ngpt.config.suggest import nearest

PREFIX = "engine.deepspeed"
ZERO = "zero_optimization"


_LARGEST_COUNT = 2**63 - 1  # what torch can count to


# ------------------------------------------------------------------------------------------------------ kinds of values
def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _count(value: Any) -> str | None:
    """What DeepSpeed reads as a number of elements, steps or levels: 5e7 is as good as 50000000."""
    whole = (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    if not whole:
        return "must be a whole number"
    return None if 0 <= value <= _LARGEST_COUNT else f"must be at least 0 and at most {_LARGEST_COUNT}"


def _level(value: Any) -> str | None:
    levels = ("debug", "info", "warning", "error", "critical")
    return None if value in levels else f"must be one of {', '.join(levels)}"


def _section(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "must be a section, such as {enabled: true}"


# --------------------------------------------------------------------------------------------------------- what is whose
_STEPS = "trainer.global_batch_size, trainer.micro_batch_size and the number of ranks"
_SET_BY_NGPT = {
    "train_batch_size": "trainer.global_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "gradient_accumulation_steps": _STEPS,
    "optimizer": "optimizer=NAME and optimizer.*",
    "scheduler": "scheduler=NAME and scheduler.*",
    "gradient_clipping": "trainer.grad_clip",
    "bf16": "trainer.precision",
    "bfloat16": "trainer.precision",
    "data_types": "trainer.precision",
    "communication_data_type": "engine.communication_dtype",
    "activation_checkpointing": "trainer.activation_checkpointing",
    "compile": "trainer.compile",
    "checkpoint": "checkpoint.*",
    "wandb": "logger.wandb",
    "dataloader_drop_last": "data.*; no row is dropped",
    f"{ZERO}.stage": "engine.zero_stage",
    f"{ZERO}.offload_optimizer": "engine.offload_optimizer",
    f"{ZERO}.cpu_offload": "engine.offload_optimizer",
    f"{ZERO}.cpu_offload_param": f"{PREFIX}.{ZERO}.offload_param",
    f"{ZERO}.cpu_offload_use_pin_memory": f"{PREFIX}.{ZERO}.offload_param",
    "zero_allow_untested_optimizer": "nothing: the optimizers are ngpt's own and tested with it",
    "zero_force_ds_cpu_optimizer": "engine.offload_optimizer",
}
_OWN_UPDATES = "it acts on DeepSpeed's own ZeRO optimizers, in whose place ngpt's stand; remove it"
_OWN_CHECKPOINTS = "it acts on DeepSpeed's own checkpoints, in whose place ngpt's stand; see checkpoint.*"
_SUMMED = "gradients are summed over ranks and the loss is divided by the label tokens of the global batch, whatever their split; remove it"
_NO_LOSS_SCALE = "there is no fp16 and no loss scale here; use trainer.precision=bf16 or another of its choices"
_DENSE_DATA_PARALLEL = "ngpt trains dense models with data parallelism alone; remove it"
_OWN_COMMUNICATION = "weights are gathered, and slices of them updated, in the dtype in which they are kept; remove it"
_REFUSED = {
    "fp16": _NO_LOSS_SCALE,
    "amp": _NO_LOSS_SCALE,
    "torch_autocast": "weights and activations have the dtype of trainer.precision, and nothing is cast on the way; remove it",
    "managed_gradient_accumulation": "the trainer says when an update ends, and per-layer updates need to know before backward; remove it",
    "prescale_gradients": _SUMMED,
    "gradient_predivide_factor": _SUMMED,
    "gradient_allreduce_op": _SUMMED,
    "sparse_gradients": "embeddings have dense gradients here; remove it",
    "disable_allgather": _OWN_UPDATES,
    "seq_parallel_communication_data_type": _DENSE_DATA_PARALLEL,
    "sequence_parallel_size": _DENSE_DATA_PARALLEL,
    "data_parallel_size": _DENSE_DATA_PARALLEL,
    "tensor_parallel": _DENSE_DATA_PARALLEL,
    "expert_parallel": _DENSE_DATA_PARALLEL,
    "use_data_before_expert_parallelism": _DENSE_DATA_PARALLEL,
    "pipeline": _DENSE_DATA_PARALLEL,
    "hybrid_engine": "it serves reinforcement learning from human feedback, not pretraining; remove it",
    "disable_python_gc": "memory is left to Python here; remove it",
    "autotuning": "it starts runs of its own and ends them, past ngpt's launcher, data order and checkpoints; remove it",
    "data_efficiency": "the order of the data is ngpt's, which resumes exactly; remove it",
    "curriculum_learning": "the order of the data is ngpt's, which resumes exactly; remove it",
    "compression_training": "it changes weights behind the optimizer; remove it",
    "weight_quantization": "it changes weights behind the optimizer; remove it",
    "quantize_training": "it changes weights behind the optimizer; remove it",
    "progressive_layer_drop": "it drops layers rank by rank, which the ranks' common update does not allow; remove it",
    "aio": "ngpt keeps nothing on NVMe: slices of weights are updated in place; remove it",
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "nebula": _OWN_CHECKPOINTS,
    "vocabulary_size": "model.vocab_size says it; remove it",
    "elasticity": "a run continues on any number of ranks from its checkpoint; remove it",
    "eigenvalue": "DeepSpeed removed it; remove it too",
    "graph_harvesting": "DeepSpeed removed it; remove it too",
    "sparse_attention": "DeepSpeed removed it; remove it too",
    **{
        f"{ZERO}.{key}": _OWN_UPDATES
        for key in (
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "compute_grad_norm",
            "ignore_unused_parameters",
            "legacy_stage1",
            "round_robin_gradients",
            "parameter_alignment",
            "sub_group_size",
            "zenflow",
            "save_muon_momentum_buffer_in_memory",
        )
    },
    **{
        f"{ZERO}.{key}": _OWN_CHECKPOINTS
        for key in (
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "gather_16bit_weights_on_model_save",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "pipeline_loading_checkpoint",
        )
    },
    **{
        f"{ZERO}.{key}": _OWN_COMMUNICATION
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zeropp_loco_param")
    },
    f"{ZERO}.zero_hpz_partition_size": "it keeps a second copy of the weights, which the sharded update would not reach; remove it",
    f"{ZERO}.mics_shard_size": "weights are partitioned over all ranks; remove it",
    f"{ZERO}.mics_hierarchical_params_gather": "weights are partitioned over all ranks; remove it",
    f"{ZERO}.leaf_module": "it serves mixtures of experts; remove it",
    f"{ZERO}.override_module_apply": "weights are drawn in the model's constructors; remove it",
}
_PASSED_ON: dict[str, Callable[[Any], str | None]] = {
    "wall_clock_breakdown": _flag,
    "memory_breakdown": _flag,
    "dump_state": _flag,
    "steps_per_print": _count,
    "log_level": _level,
    "flops_profiler": _section,
    "comms_logger": _section,
    "timers": _section,
    "tensorboard": _section,
    "csv_monitor": _section,
    "comet": _section,
}
_PASSED_ON_AT_STAGE_3: dict[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(
        (
            "prefetch_bucket_size",
            "stage3_prefetch_bucket_size",
            "param_persistence_threshold",
            "stage3_param_persistence_threshold",
            "model_persistence_threshold",
            "stage3_model_persistence_threshold",
            "max_live_parameters",
            "stage3_max_live_parameters",
            "max_reuse_distance",
            "stage3_max_reuse_distance",
            "module_granularity_threshold",
            "stage3_module_granularity_threshold",
        ),
        _count,
    ),
    **dict.fromkeys(("overlap_comm", "log_trace_cache_warnings", "enable_sanity_checks", "memory_efficient_linear"), _flag),
    **dict.fromkeys(
        (
            "allgather_sequential",
            "stage3_allgather_sequential",
            "use_all_reduce_for_fetch_params",
            "stage3_use_all_reduce_for_fetch_params",
        ),
        _flag,
    ),
    "offload_param": _section,
}
_OFFLOAD_PARAM = ("device", "pin_memory")
# What these options have to say goes through DeepSpeed's logger at level INFO, which is silent otherwise.
_SPEAKING = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger", "steps_per_print")


# ------------------------------------------------------------------------------------------------------------- checking
def deepspeed_problems(options: Mapping[str, Any], *, zero_stage: int) -> list[str]:
    """One line for everything in `engine.deepspeed` that cannot be passed on to DeepSpeed at this stage."""
    problems: list[str] = []
    for key, value in options.items():
        if key != ZERO:
            problems += _problems_of(str(key), value, _PASSED_ON)
        elif not isinstance(value, Mapping):
            problems.append(_line(key, value, "must be a section of options", "the stage itself is engine.zero_stage"))
        else:
            for inner, inner_value in value.items():
                problems += _problems_of_zero(inner, inner_value, zero_stage)
    return problems


def _problems_of_zero(key: str, value: Any, zero_stage: int) -> Iterator[str]:
    path = f"{ZERO}.{key}"
    allowed = {f"{ZERO}.{name}": check for name, check in _PASSED_ON_AT_STAGE_3.items()}
    found = list(_problems_of(path, value, allowed))
    if not found and zero_stage < 3:
        found.append(_line(path, value, f"has no effect at engine.zero_stage={zero_stage}", "remove it, or choose engine.zero_stage=3"))
    if not found and key == "offload_param":
        found += _problems_of_offload(path, value)
    yield from found


def _problems_of_offload(path: str, value: Mapping[str, Any]) -> Iterator[str]:
    for key in value:
        if key not in _OFFLOAD_PARAM:
            yield _line(f"{path}.{key}", value[key], "is for weights on NVMe, which ngpt cannot update in place", "remove it")
    if value.get("device", "none") not in ("none", "cpu"):
        yield _line(
            f"{path}.device", value["device"], "ngpt updates slices of weights in place, on the device or in the host's memory", "use cpu"
        )


def _problems_of(path: str, value: Any, allowed: Mapping[str, Callable[[Any], str | None]]) -> Iterator[str]:
    if path in _SET_BY_NGPT:
        yield _line(path, value, "ngpt sets this itself", f"use {_SET_BY_NGPT[path]}")
    elif path in _REFUSED:
        yield f"{PREFIX}.{path} = {_brief(value)}: {_REFUSED[path]}"
    elif path not in allowed:
        meant = nearest(path, _known(within_zero=path.startswith(f"{ZERO}.")))
        fix = f"did you mean {PREFIX}.{meant}?" if meant else f"these are passed on: {', '.join(allowed)}"
        yield _line(path, value, "no such option of DeepSpeed", fix)
    elif (rule := allowed[path](value)) is not None:
        yield _line(path, value, rule, "or leave it out")


def _known(*, within_zero: bool) -> Iterable[str]:
    """Options that a misspelt one may have meant."""
    named = [*_SET_BY_NGPT, *_REFUSED, *_PASSED_ON, *(f"{ZERO}.{key}" for key in _PASSED_ON_AT_STAGE_3), ZERO]
    return [key for key in named if key.startswith(f"{ZERO}.") == within_zero]


def _line(path: str, value: Any, rule: str, fix: str) -> str:
    return problem(f"{PREFIX}.{path}", _brief(value), rule, fix)


def _brief(value: Any) -> Any:
    return "{...}" if isinstance(value, Mapping) else value


# ------------------------------------------------------------------------------------------------------- the dictionary
def deepspeed_config(
    options: Mapping[str, Any],
    *,
    zero_stage: int,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
) -> dict[str, Any]:
    """The dictionary for DeepSpeed.

    DeepSpeed hears of no dtype, no clipping and no optimizer: weights keep the dtype in which the model was built, and everything from
    the gradient on is ngpt's.

    Args:
        options: the user's further ones, `engine.deepspeed`.
        zero_stage: 0 to 3.
        micro_batch_size: sequences of one forward pass on one rank; DeepSpeed only reports with it.
        accumulation_steps: micro-batches of an update.
        world_size: ranks.

    Raises:
        ConfigError: options that cannot be passed on, all of them in one error.
    """
    problems = deepspeed_problems(options, zero_stage=zero_stage)
    if problems:
        raise ConfigError(problems)
    passed_on = {key: _plain(value) for key, value in options.items() if key != ZERO}
    return {
        "steps_per_print": None,  # the trainer reports
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every step
        **passed_on,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "gradient_clipping": 0.0,  # else DeepSpeed clips at 1
        "zero_allow_untested_optimizer": True,
        ZERO: {**_plain(options.get(ZERO, {})), "stage": zero_stage},
    }


def speaks(options: Mapping[str, Any]) -> bool:
    """Whether the user asked for something that DeepSpeed answers through its log."""
    given = [options[key] for key in _SPEAKING if key in options]
    return any(value.get("enabled", False) if isinstance(value, Mapping) else bool(value) for value in given)


def _plain(value: Any) -> Any:
    """The value with plain dictionaries in it, and whole numbers as int."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
