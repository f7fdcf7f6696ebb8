"""Every setting of a run: one dataclass per group of conf/, each field with its type, default, unit and meaning.

Defaults live here (those of optimizers in `ngpt.config.optimizers`) and nowhere else; the files of conf/ hold only what differs.
`setting` also records the rule that a single value must obey, so that `ngpt.config.validate` can check all of them in one pass and
name the value, the rule and the fix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

from ngpt.config.optimizers import (
    AdamWConfig,
    AdaRankGradConfig,
    GaLoreConfig,
    LoRAConfig,
    NaturalGaLoreConfig,
    OptimizerConfig,
    ReLoRAConfig,
)
from ngpt.config.setting import setting

# OmegaConf resolves annotations with typing.get_type_hints and does not read `X | None` on every Python that we support.
# ruff: noqa: UP045, RUF009


# --------------------------------------------------------------------------------------------------------------- model
@dataclass
class ModelConfig:
    """Shape of a LLaMA decoder, in the words of Hugging Face's LlamaConfig."""

    name: str = setting("llama", "label of the preset, used in run names")
    vocab_size: int = setting(32000, "rows of the embedding and of the head", at_least=2)
    hidden_size: int = setting(512, "width of the residual stream", at_least=1)
    intermediate_size: int = setting(1376, "width of the SwiGLU feed-forward layer", at_least=1)
    num_hidden_layers: int = setting(8, "decoder blocks", at_least=1)
    num_attention_heads: int = setting(8, "query heads", at_least=1)
    num_key_value_heads: Optional[int] = setting(None, "key/value heads (null: as many as query heads)", at_least=1)
    max_seq_len: int = setting(1024, "longest sequence the model is built for, tokens", at_least=1)
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", above=0)
    rms_norm_eps: float = setting(1e-6, "added to the mean square in RMSNorm", above=0)
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", above=0)
    tie_word_embeddings: bool = setting(False, "use the embedding matrix as the head")
    init_from: Optional[str] = setting(
        None, "LLaMA folder in Hugging Face's layout (config.json, safetensors) whose weights training begins with; not read on a resume"
    )


# ------------------------------------------------------------------------------------------------------ text and tokens
@dataclass
class TokenizerConfig:
    path: Optional[str] = setting(None, "SentencePiece .model file (null only for data=synthetic)")


@dataclass
class DataConfig:
    """What every source of text has in common."""

    name: str = MISSING
    packing: str = setting(
        "pack", "pack: documents joined by EOS, nothing padded or dropped; pad: one document a row, cut or padded", choices=("pack", "pad")
    )
    mask_documents: bool = setting(False, "with packing=pack: attention does not cross document borders")
    shuffle_window: int = setting(2048, "documents (tokenized: rows) shuffled together, per stream (0 or 1: keep the order)", at_least=0)
    streams: int = setting(8, "most logical streams that rows are drawn from in turn; fixes the order for any number of ranks", at_least=1)
    holdout_every: int = setting(50, "where no val_files are given, every n-th document is held out for evaluation", at_least=2)
    max_bad_documents: int = setting(100, "bad documents (broken JSON, missing text, ...) skipped before the run stops", at_least=0)
    prefetch_batches: int = setting(8, "micro-batches prepared ahead of the model", at_least=1)


@dataclass
class BuiltinDataConfig(DataConfig):
    """English prose of the Python standard library's documentation and docstrings: no network, no files."""

    name: str = setting("builtin", "source of the text (choose with data=...)", choices=("builtin",))


@dataclass
class LocalC4DataConfig(DataConfig):
    """Local shards in C4's layout: *.json.gz, *.jsonl, *.json.zst, one object with `text` a line."""

    name: str = setting("local_c4", "source of the text (choose with data=...)", choices=("local_c4",))
    train_files: list[str] = setting([], "globs of training shards")
    val_files: list[str] = setting([], "globs of held-out shards (empty: see holdout_every)")


@dataclass
class C4DataConfig(DataConfig):
    """The hub's C4, streamed through `datasets`."""

    name: str = setting("c4", "source of the text (choose with data=...)", choices=("c4",))
    repository: str = setting("allenai/c4", "dataset repository on the hub")
    subset: str = setting("en", "configuration of the dataset")
    revision: str = setting("1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "commit of the dataset repository")
    train_split: str = setting("train", "split to train on")
    val_split: str = setting("validation", "split to evaluate on")
    max_retries: int = setting(8, "attempts at a failed read before the run stops", at_least=0)
    retry_seconds: float = setting(1.0, "wait before the first retry; doubles each time, up to a minute", at_least=0)


@dataclass
class TokenizedDataConfig(DataConfig):
    """Token shards written by `python -m data_prep.tokenize`: folders with a manifest."""

    name: str = setting("tokenized", "source of the text (choose with data=...)", choices=("tokenized",))
    train_files: list[str] = setting([], "globs of folders (or their manifest.json) to train on")
    val_files: list[str] = setting([], "globs of folders (or their manifest.json) to evaluate on")
    verify: bool = setting(True, "read all shards before training and compare their checksums: about a second per GB and process")


@dataclass
class SyntheticDataConfig(DataConfig):
    """Seeded Markov text over the whole vocabulary, for tests and benchmarks: needs no tokenizer."""

    name: str = setting("synthetic", "source of the text (choose with data=...)", choices=("synthetic",))
    document_tokens: int = setting(512, "mean length of a document, tokens", at_least=1)


# ------------------------------------------------------------------------------------------------------------ scheduler
@dataclass
class SchedulerConfig:
    """Learning rate over the run: a warm-up, then the shape of the group."""

    name: str = MISSING
    warmup_steps: Optional[int] = setting(None, "steps of linear warm-up (null: warmup_fraction of the run)", at_least=0)
    warmup_fraction: float = setting(0.1, "share of the run spent warming up, where warmup_steps is null", at_least=0, below=1)


@dataclass
class CosineSchedulerConfig(SchedulerConfig):
    name: str = setting("cosine", "schedule (choose with scheduler=...)", choices=("cosine",))
    min_lr_ratio: float = setting(0.1, "floor, as a share of the peak", at_least=0, at_most=1)


@dataclass
class LinearSchedulerConfig(SchedulerConfig):
    name: str = setting("linear", "schedule (choose with scheduler=...)", choices=("linear",))
    min_lr_ratio: float = setting(0.0, "floor, as a share of the peak", at_least=0, at_most=1)


@dataclass
class WSDSchedulerConfig(SchedulerConfig):
    """Warm-up, stable, decay."""

    name: str = setting("wsd", "schedule (choose with scheduler=...)", choices=("wsd",))
    decay_fraction: float = setting(0.2, "share of the run, at its end, in which the rate falls linearly", above=0, at_most=1)
    min_lr_ratio: float = setting(0.0, "floor, as a share of the peak", at_least=0, at_most=1)


@dataclass
class ConstantSchedulerConfig(SchedulerConfig):
    name: str = setting("constant", "schedule (choose with scheduler=...)", choices=("constant",))


# -------------------------------------------------------------------------------------------------- trainer and the rest
@dataclass
class TrainerConfig:
    max_steps: Optional[int] = setting(None, "optimizer updates in the run (or give max_tokens)", at_least=1)
    max_tokens: Optional[int] = setting(None, "token positions in the run, global_batch_size * seq_len a step (or max_steps)", at_least=1)
    global_batch_size: int = setting(512, "sequences per update, over all ranks and micro-batches", at_least=1)
    micro_batch_size: int = setting(16, "sequences per forward pass, per rank", at_least=1)
    seq_len: int = setting(256, "tokens per sequence", at_least=1)
    grad_clip: float = setting(0.0, "largest global gradient norm (0: no clipping)", at_least=0)
    precision: str = setting(
        "bf16",
        "fp32; bf16: bf16 weights with stochastic rounding; bf16_nearest: bf16 weights rounded to nearest; bf16_master: with an fp32 copy",
        choices=("fp32", "bf16", "bf16_nearest", "bf16_master"),
    )
    device: str = setting("auto", "auto: an NVIDIA GPU if there is one", choices=("auto", "cpu", "cuda"))
    activation_checkpointing: str = setting("off", "off; full: recompute every block; every_K: recompute every K-th block, e.g. every_2")
    loss_chunk_tokens: int = setting(1024, "positions whose logits exist at one time", at_least=1)
    compile: bool = setting(False, "compile the decoder blocks with torch.compile")
    peak_flops: Optional[float] = setting(None, "FLOP/s of one device for the MFU (null: known from its name, or measured)", above=0)
    max_nonfinite_steps: int = setting(10, "skipped updates in a row (loss or gradient not finite) after which the run stops", at_least=1)
    on_spike: str = setting(
        "log",
        "a loss far above those before it. log: count it; skip: drop its update; rollback: go back to the last checkpoint, and on with "
        "the batches that follow the spike",
        choices=("log", "skip", "rollback"),
    )
    spike_window: int = setting(128, "losses by whose median and deviation a spike is told", at_least=8)
    spike_deviations: float = setting(10.0, "standard deviations above the median that make a loss a spike", above=0)
    max_rollbacks: int = setting(3, "times that spikes may send a run back before it stops", at_least=1)
    hang_seconds: int = setting(
        1800, "time without progress after which the stacks of all processes are written and the run stops (0: wait for ever)", at_least=0
    )
    profile_at: Optional[int] = setting(None, "first step of a window of the torch profiler (null: none)", at_least=1)
    profile_steps: int = setting(3, "steps of that window", at_least=1)
    memory_snapshot: bool = setting(
        False, "record what the memory of the GPU is used for, and write it to the run folder when it runs out (costs a few percent)"
    )
    deterministic: bool = setting(False, "only algorithms that give the same bits every time, on a GPU too; slower there")


@dataclass
class EngineConfig:
    name: str = setting(
        "auto",
        "what holds devices, precision and sharding: local for one process, deepspeed for any number; auto: whichever fits the launch",
        choices=("auto", "local", "deepspeed"),
    )
    zero_stage: int = setting(
        1,
        "what is divided among processes. 0: nothing; 1: optimizer state; 2: and accumulated gradients; 3: and weights",
        at_least=0,
        at_most=3,
    )
    timeout_seconds: int = setting(600, "wait for a process that died or hangs before all others stop", at_least=1)
    check_replicas_every: int = setting(
        0, "steps between comparisons of the weights that all processes have, and of their place in the data (0: none)", at_least=0
    )
    communication_dtype: str = setting(
        "auto", "dtype in which gradients are summed over processes; auto: that of the weights", choices=("auto", "fp32", "bf16")
    )
    offload_optimizer: bool = setting(False, "keep optimizer state in the memory of the CPU")
    deepspeed: dict[str, Any] = setting({}, "further options of DeepSpeed, as in its JSON: engine.deepspeed.wall_clock_breakdown=true")


@dataclass
class CheckpointConfig:
    every_steps: int = setting(1000, "steps between checkpoints (0: none on the way)", at_least=0)
    keep: int = setting(3, "newest checkpoints kept; one that is broken does not count", at_least=1)
    keep_every: int = setting(0, "checkpoints whose step is a multiple of this stay for ever (0: none)", at_least=0)
    at_end: bool = setting(True, "write one after the last step")
    on_error: str = setting(
        "warn",
        "when a checkpoint cannot be written (full disk, ...): warn and train on, or stop; the last one of a run always stops",
        choices=("warn", "stop"),
    )
    asynchronous: bool = setting(
        False, "write in the background, from a copy in the CPU's memory: as much again as weights (on rank 0) and optimizer state"
    )


@dataclass
class LoggerConfig:
    every_steps: int = setting(10, "steps between log lines", at_least=1)
    statistics_every: int = setting(
        0, "steps between records of every parameter's gradient, update and weight, and of every subspace (0: none)", at_least=0
    )
    wandb: str = setting(
        "disabled",
        "Weights & Biases: online, offline (sync later with `wandb sync`) or disabled",
        choices=("online", "offline", "disabled"),
    )
    project: Optional[str] = setting(None, "W&B project (null: WANDB_PROJECT of the environment, else ngpt)")
    entity: Optional[str] = setting(None, "W&B team or user (null: WANDB_ENTITY of the environment, else your default)")
    group: Optional[str] = setting(None, "W&B group")
    tags: list[str] = setting([], "W&B tags")
    tensorboard: bool = setting(False, "TensorBoard's event files in `tensorboard/` of the run folder (needs the package tensorboard)")


@dataclass
class EvalConfig:
    every_steps: int = setting(1000, "steps between evaluations (0: none on the way)", at_least=0)
    max_tokens: int = setting(10_000_000, "held-out tokens to evaluate on, the same ones every time", at_least=1)
    at_end: bool = setting(True, "evaluate after the last step")
    sample_prompts: list[str] = setting([], "texts that the model continues at each evaluation, on the console and in samples.jsonl")
    sample_tokens: int = setting(64, "most tokens of each such continuation", at_least=1)
    sample_temperature: float = setting(0.8, "of these continuations; 0 takes the most probable token", at_least=0)
    unigram_baseline: bool = setting(False, "at the end, print the held-out perplexity of a unigram model of the training tokens")


@dataclass
class RunSectionConfig:
    name: str = setting("${model.name}-${data.name}-${optimizer.name}", "folder of the run, below run.dir")
    dir: str = setting("runs", "parent folder of all runs")


@dataclass
class RunConfig:
    """The whole configuration of a run: what `conf/config.yaml` composes and `config.yaml` of a run folder records."""

    model: ModelConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    scheduler: SchedulerConfig = MISSING
    trainer: TrainerConfig = MISSING
    engine: EngineConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    logger: LoggerConfig = MISSING
    eval: EvalConfig = MISSING
    run: RunSectionConfig = dataclasses.field(default_factory=RunSectionConfig)
    seed: int = setting(0, "of the initial weights, of the data order and of stochastic rounding", at_least=0)
    resume: str = setting("auto", "auto: continue from the run folder's newest checkpoint; never: refuse to touch one; or a step folder")


# The variants of each group. Each is registered as schema_<name>, which the files of conf/<group>/ extend.
GROUPS: dict[str, dict[str, type]] = {
    "model": {"model": ModelConfig},
    "tokenizer": {"tokenizer": TokenizerConfig},
    "data": {
        "builtin": BuiltinDataConfig,
        "local_c4": LocalC4DataConfig,
        "c4": C4DataConfig,
        "tokenized": TokenizedDataConfig,
        "synthetic": SyntheticDataConfig,
    },
    "optimizer": {
        "adamw": AdamWConfig,
        "galore": GaLoreConfig,
        "natural_galore": NaturalGaLoreConfig,
        "adarankgrad": AdaRankGradConfig,
        "lora": LoRAConfig,
        "relora": ReLoRAConfig,
    },
    "scheduler": {
        "cosine": CosineSchedulerConfig,
        "linear": LinearSchedulerConfig,
        "wsd": WSDSchedulerConfig,
        "constant": ConstantSchedulerConfig,
    },
    "trainer": {"trainer": TrainerConfig},
    "engine": {"engine": EngineConfig},
    "checkpoint": {"checkpoint": CheckpointConfig},
    "logger": {"logger": LoggerConfig},
    "eval": {"eval": EvalConfig},
}


def steps_in_run(trainer: TrainerConfig) -> int:
    """Number of updates: `max_steps`, or enough of them to cover `max_tokens` positions (validation allows exactly one)."""
    if trainer.max_steps is not None:
        return trainer.max_steps
    assert trainer.max_tokens is not None
    positions_per_step = trainer.global_batch_size * trainer.seq_len
    return -(-trainer.max_tokens // positions_per_step)


def engine_of_launch(engine: EngineConfig, world_size: int) -> str:
    """The engine, local or deepspeed, that `engine.name` means in a launch of `world_size` processes."""
    if engine.name != "auto":
        return engine.name
    return "deepspeed" if world_size > 1 else "local"


def warmup_steps_in_run(scheduler: SchedulerConfig, total_steps: int) -> int:
    """Updates of warm-up: `warmup_steps`, or `warmup_fraction` of the run where that is null."""
    if scheduler.warmup_steps is not None:
        return scheduler.warmup_steps
    return round(scheduler.warmup_fraction * total_steps)


def decay_steps_in_run(scheduler: WSDSchedulerConfig, total_steps: int) -> int:
    """Updates at the end of the run over which WSD lowers the rate."""
    return round(scheduler.decay_fraction * total_steps)


def checkpointing_interval(trainer: TrainerConfig) -> int:
    """Blocks per recomputed block: 0 for `off`, 1 for `full`, K for `every_K`. Raises ValueError for anything else."""
    policy = trainer.activation_checkpointing
    if policy in ("off", "full"):
        return int(policy == "full")
    prefix, _, count = policy.partition("_")
    if prefix != "every" or not count.isdigit() or int(count) < 1:
        raise ValueError(f"{policy!r} is not off, full or every_K with K >= 1")
    return int(count)
