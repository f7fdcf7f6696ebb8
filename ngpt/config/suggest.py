"""What a user meant by a setting that does not exist: other programs' names, the right name in the wrong section, typing slips."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

from ngpt.config.schema import GROUPS, RunConfig, RunSectionConfig

# Names of the GaLore family's scripts, torchtitan, litgpt, lingua and nanotron.
_NAMES_ELSEWHERE = {
    "alpha": "optimizer.scale",
    "galore_scale": "optimizer.scale",
    "update_freq": "optimizer.update_proj_gap",
    "natural_history": "optimizer.history",
    "lambda": "optimizer.damping",
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "num_training_steps": "trainer.max_steps",
    "steps": "trainer.max_steps",
    "num_steps": "trainer.max_steps",
    "max_train_tokens": "trainer.max_tokens",
    "tokens": "trainer.max_tokens",
    "total_batch_size": "trainer.global_batch_size",
    "batch_size": "trainer.micro_batch_size",
    "max_length": "trainer.seq_len",
    "sequence_length": "trainer.seq_len",
    "grad_clipping": "trainer.grad_clip",
    "max_grad_norm": "trainer.grad_clip",
    "max_norm": "trainer.grad_clip",
    "dtype": "trainer.precision",
    "max_sequence_length": "model.max_seq_len",
    "max_position_embeddings": "model.max_seq_len",
    "save_every": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "keep_latest_k": "checkpoint.keep",
    "eval_every": "eval.every_steps",
    "eval_interval": "eval.every_steps",
    "log_freq": "logger.every_steps",
    "log_interval": "logger.every_steps",
    "output_dir": "run.dir",
    "save_dir": "run.dir",
    "continue_from": "resume",
}


def settings() -> dict[str, list[str]]:
    """Every setting of every group by its path, with the variants that have it (empty where the section is no group)."""
    found: dict[str, list[str]] = {}
    for group, variants in GROUPS.items():
        for variant, schema in variants.items():
            for field in dataclasses.fields(schema):
                found.setdefault(f"{group}.{field.name}", []).append(variant)
    found.update({f"run.{field.name}": [] for field in dataclasses.fields(RunSectionConfig)})
    found.update({field.name: [] for field in dataclasses.fields(RunConfig) if field.name not in GROUPS and field.name != "run"})
    return found


def variants_with(paths: Iterable[str]) -> list[str]:
    """The variants of a group that have every one of the settings at `paths`."""
    known = settings()
    having = [known.get(path, []) for path in paths]
    return [variant for variant in having[0] if all(variant in variants for variants in having)]


def nearest(word: str, accepted: Iterable[str]) -> str | None:
    """The accepted word that looks most like `word`, if any does."""
    return next(iter(difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.7)), None)


def nearest_settings(key: str) -> list[str]:
    """Up to three settings that `key` may have meant, best first."""
    section, _, name = key.rpartition(".")
    if name in _NAMES_ELSEWHERE:
        return [_NAMES_ELSEWHERE[name]]
    paths = list(settings())

    def section_likeness(path: str) -> float:
        return difflib.SequenceMatcher(None, section, path.rpartition(".")[0]).ratio()

    same_name = [path for path in paths if path.rpartition(".")[2] == name]
    if same_name:
        same_name.sort(key=section_likeness, reverse=True)
        return same_name[:1] if section and section_likeness(same_name[0]) > 0.6 else same_name[:3]
    in_section = [path for path in paths if section and path.startswith(f"{section}.")]
    by_name = nearest(name, (path.rpartition(".")[2] for path in in_section or paths))
    if by_name is not None:
        return [path for path in in_section or paths if path.rpartition(".")[2] == by_name][:3]
    return difflib.get_close_matches(key, paths, n=1, cutoff=0.85)


def unknown_setting(key: str, value: object, chosen: dict[str, str]) -> str:
    """The line of the error for a setting that does not exist; `chosen` maps each group to its variant in this run."""
    group = key.partition(".")[0]
    variants = settings().get(key, [])
    if variants and chosen.get(group) not in variants:
        return (
            f"{key} = {value}: not a setting of {group}={chosen.get(group)}; "
            f"choose {' or '.join(f'{group}={variant}' for variant in variants)}, or remove it"
        )
    group_meant = nearest(key, [*GROUPS, "experiment"]) if "." not in key else None
    meant = [f"{group_meant}={value}"] if group_meant else nearest_settings(key)
    fix = f"did you mean {' or '.join(meant)}?" if meant else "docs/configuration.md lists all of them"
    return f"{key} = {value}: no such setting; {fix}"
