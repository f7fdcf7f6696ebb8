"""Settings of the optimizers: one dataclass per choice of optimizer=..., each field with its type, default, unit and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from ngpt.config.setting import setting

# OmegaConf resolves annotations with typing.get_type_hints and does not read `X | None` on every Python that we support.
# ruff: noqa: UP045, RUF009


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
    forbid_full_gradients: bool = setting(
        False,
        "refuse settings that keep whole gradients of the blocks' matrices until the update: apply=whole, and under apply=deferred AdamW, "
        "fisher=diagonal and any complement (embedding, head and norms always keep theirs)",
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
