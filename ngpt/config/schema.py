"""Every setting of a run: one dataclass per group of conf/, each field with its type, default, unit and meaning.

Defaults live here and nowhere else; the files of conf/ hold only what differs. `setting` also records the rule that a
single value must obey, so that `ngpt.config.validate` can check all of them in one pass and name the value, the rule and the fix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

# OmegaConf resolves annotations with typing.get_type_hints and does not read `X | None` on every Python that we support.
# ruff: noqa: UP045, RUF009


def setting(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that carries its meaning (with the unit) and the rule for its value as metadata."""
    rules = {"choices": choices, "at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"meaning": meaning} | {name: bound for name, bound in rules.items() if bound is not None}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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


@dataclass
class SyntheticDataConfig(DataConfig):
    """Seeded Markov text over the whole vocabulary, for tests and benchmarks: needs no tokenizer."""

    name: str = setting("synthetic", "source of the text (choose with data=...)", choices=("synthetic",))
    document_tokens: int = setting(512, "mean length of a document, tokens", at_least=1)


# ------------------------------------------------------------------------------------------------------------ optimizer
@dataclass
class OptimizerConfig:
    """What every optimizer has in common."""

    name: str = MISSING
    lr: float = setting(1e-3, "peak learning rate", above=0)
    betas: list[float] = setting([0.9, 0.999], "decay of the first and of the second moment")
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay, per unit of learning rate", at_least=0)
    state_dtype: str = setting("fp32", "how moments are kept: fp32; bf16, half of that; 8bit, a quarter", choices=("fp32", "bf16", "8bit"))
    apply: str = setting(
        "deferred",
        "whole: keep all gradients until the update; deferred: project and free each gradient during backward, update afterwards; "
        "immediate: update each layer inside backward (least memory; no accumulation, no clipping)",
        choices=("whole", "deferred", "immediate"),
    )


@dataclass
class AdamWConfig(OptimizerConfig):
    name: str = setting("adamw", "optimizer (choose with optimizer=...)", choices=("adamw",))


@dataclass
class LowRankConfig(OptimizerConfig):
    """What optimizers on projected gradients have in common. Norms, and as a rule embedding and head, get plain AdamW."""

    lr: float = setting(1e-2, "peak learning rate", above=0)
    eps: float = setting(1e-6, "added to the root of the second moment", above=0)
    rank: int = setting(128, "rank of the projected gradients", at_least=1)
    update_proj_gap: int = setting(200, "updates between refreshes of a matrix's subspace", at_least=1)
    scale: float = setting(0.25, "factor on the lifted update (alpha of the papers)", above=0)
    subspace: str = setting(
        "randomized",
        "how a basis is found: exact SVD, a warm-started randomized range finder, or at random",
        choices=("svd", "randomized", "random"),
    )
    on_refresh: str = setting("rotate", "what happens to moments and Fisher when the basis changes", choices=("rotate", "keep", "reset"))
    stagger: bool = setting(True, "spread the refreshes of different matrices over update_proj_gap steps")
    moments: str = setting(
        "adam",
        "of projected gradients: Adam's; Adam's with a factored second one; only the first",
        choices=("adam", "adafactor", "momentum"),
    )
    embeddings: bool = setting(False, "project embedding and head as well, at scale 1, instead of plain AdamW")
    complement: str = setting(
        "none", "fira: add back what the projection dropped, scaled by column; needs full gradients at the update", choices=("none", "fira")
    )


@dataclass
class GaLoreConfig(LowRankConfig):
    """GaLore (arXiv:2403.03507): Adam on gradients projected to rank r. The defaults are the published method's."""

    name: str = setting("galore", "optimizer (choose with optimizer=...)", choices=("galore",))
    subspace: str = setting(
        "svd",
        "how a basis is found: exact SVD, a warm-started randomized range finder, or at random",
        choices=("svd", "randomized", "random"),
    )
    on_refresh: str = setting(
        "keep", "what happens to moments when the basis changes (keep is the published GaLore)", choices=("rotate", "keep", "reset")
    )
    stagger: bool = setting(False, "spread the refreshes of different matrices over update_proj_gap steps")
    proj_type: str = setting("std", "std: the shorter side is projected; full: both are", choices=("std", "full"))


@dataclass
class NaturalGaLoreConfig(LowRankConfig):
    """Natural GaLore (arXiv:2410.16029): GaLore on gradients preconditioned by their inverse empirical Fisher."""

    name: str = setting("natural_galore", "optimizer (choose with optimizer=...)", choices=("natural_galore",))
    betas: list[float] = setting([0.9, 0.99], "decay of the first and of the second moment, or of the Fisher's averages")
    fisher: str = setting(
        "diagonal",
        "history: of the last `history` projected gradients (the paper); two_sided: the same with both sides projected (the authors' "
        "release); factored: r x r second moments; diagonal: row and column means of the squared full gradient, which is kept for it; "
        "none: GaLore",
        choices=("history", "two_sided", "factored", "diagonal", "none"),
    )
    history: Optional[int] = setting(
        None, "projected gradients kept per matrix by history and two_sided (null: 20, s of the paper)", at_least=1
    )
    damping: float = setting(1e-3, "lambda of lambda*I + H H'; a share of the Fisher's mean for factored and diagonal", above=0)
    moments: Optional[str] = setting(
        None,
        "as for GaLore (null: adam, but momentum for fisher=diagonal, which replaces the second moment)",
        choices=("adam", "adafactor", "momentum"),
    )
    complement: Optional[str] = setting(
        None, "fira: as for GaLore; raw: for fisher=diagonal, which scales it (null: that or none)", choices=("none", "fira", "raw")
    )


@dataclass
class AdaRankGradConfig(LowRankConfig):
    """AdaRankGrad (arXiv:2410.17881): GaLore whose rank follows the gradient's. `rank` is the largest, for which state is allocated."""

    name: str = setting("adarankgrad", "optimizer (choose with optimizer=...)", choices=("adarankgrad",))
    min_rank: int = setting(1, "smallest rank", at_least=1)
    energy: float = setting(0.96, "share of the squared gradient that the rank keeps", above=0, at_most=1)
    converged_below: float = setting(
        0.5, "refresh when the projected gradient is below this share of its norm at the last one (0: never)", at_least=0, below=1
    )


@dataclass
class LoRAConfig(OptimizerConfig):
    """LoRA (arXiv:2106.09685) from scratch: AdamW on adapters of the frozen matrices of attention and MLP, and on all other weights."""

    name: str = setting("lora", "optimizer (choose with optimizer=...)", choices=("lora",))
    rank: int = setting(128, "rank of the adapters", at_least=1)
    lora_alpha: float = setting(32.0, "numerator of the adapters' factor lora_alpha / rank", above=0)


@dataclass
class ReLoRAConfig(LoRAConfig):
    """ReLoRA (arXiv:2307.05695): LoRA whose adapters are merged into the weights every so often and begin anew."""

    name: str = setting("relora", "optimizer (choose with optimizer=...)", choices=("relora",))
    merge_every: int = setting(1000, "updates between merges of the adapters into the weights", at_least=1)
    restart_warmup_steps: int = setting(100, "updates after a merge over which the learning rate climbs back to the schedule's", at_least=0)
    prune: float = setting(
        0.99, "share of the adapters' moments, the smallest, that becomes zero at a merge (1: all)", at_least=0, at_most=1
    )


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


@dataclass
class EngineConfig:
    name: str = setting("auto", "what holds devices, precision and sharding; auto: local on one process", choices=("auto", "local"))


@dataclass
class CheckpointConfig:
    every_steps: int = setting(1000, "steps between checkpoints (0: none on the way)", at_least=0)
    keep: int = setting(3, "newest checkpoints kept", at_least=1)
    at_end: bool = setting(True, "write one after the last step")


@dataclass
class LoggerConfig:
    every_steps: int = setting(10, "steps between log lines", at_least=1)
    wandb: str = setting(
        "disabled",
        "Weights & Biases: online, offline (sync later with `wandb sync`) or disabled",
        choices=("online", "offline", "disabled"),
    )
    project: Optional[str] = setting(None, "W&B project (null: WANDB_PROJECT of the environment, else ngpt)")
    entity: Optional[str] = setting(None, "W&B team or user (null: WANDB_ENTITY of the environment, else your default)")
    group: Optional[str] = setting(None, "W&B group")
    tags: list[str] = setting([], "W&B tags")


@dataclass
class EvalConfig:
    every_steps: int = setting(1000, "steps between evaluations (0: none on the way)", at_least=0)
    max_tokens: int = setting(10_000_000, "held-out tokens to evaluate on, the same ones every time", at_least=1)
    at_end: bool = setting(True, "evaluate after the last step")
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
