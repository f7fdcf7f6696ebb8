"""What must be equal when a run is continued, what may change, and the refusal that names the difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.config.redaction import redact_settings
from ngpt.config.schema import RunConfig

# Settings whose change would make the restored weights, optimizer state or data position mean something else. A prefix
# that ends in a dot covers a whole group, except for the names in MAY_CHANGE.
MUST_STAY = (
    "model.",
    "tokenizer.fingerprint",
    "data.",
    "optimizer.name",
    "optimizer.rank",
    "optimizer.fisher",
    "optimizer.history",
    "optimizer.proj_type",
    "optimizer.embeddings",
    "optimizer.moments",
    "optimizer.complement",
    "optimizer.state_dtype",
    "optimizer.lora_alpha",
    "trainer.seq_len",
    "trainer.global_batch_size",
    "trainer.precision",
    "seed",
)
MAY_CHANGE = {
    "model.name",
    "model.init_from",
    "data.max_bad_documents",
    "data.prefetch_batches",
    "data.max_retries",
    "data.retry_seconds",
    "data.verify",
}
# A corpus may move to another folder: the position in the data carries a fingerprint of its files, which the loader compares.
MAY_CHANGE |= {"data.train_files", "data.val_files"}
# Not worth a line in the log when they change: they say where and how to watch, not what is trained.
UNREMARKED = ("run.", "logger.", "checkpoint.", "resume", "tokenizer.path", "model.name")


class ResumeError(CheckpointError):
    """A run cannot continue from a checkpoint because of a setting that must not change."""


def settings_of(config: RunConfig, *, tokenizer_fingerprint: str | None) -> dict[str, Any]:
    """The configuration as a flat dict `group.key -> value` without secrets, and the tokenizer by content instead of by path."""
    return dict(_flatten("", redact_settings(dataclasses.asdict(config)))) | {"tokenizer.fingerprint": tokenizer_fingerprint}


def check_settings(saved: dict[str, Any], current: dict[str, Any], *, checkpoint: str) -> list[str]:
    """Compare the settings of a checkpoint with those of this run.

    Returns:
        A line for each changed setting that may change.

    Raises:
        ResumeError: naming every setting that must not change and did, with both values.
    """
    changed = [key for key in sorted(saved.keys() | current.keys()) if saved.get(key) != current.get(key)]
    refused = [key for key in changed if _must_stay(key)]
    if refused:
        lines = [f"  {key}: {saved.get(key)!r} in the checkpoint, {current.get(key)!r} now" for key in refused]
        raise ResumeError(
            f"cannot continue from {checkpoint}: these settings must not change within a run\n"
            + "\n".join(lines)
            + "\nset them back, or start another run with run.name=SOMETHING_ELSE"
        )
    return [f"{key}: {saved.get(key)!r} -> {current.get(key)!r}" for key in changed if not key.startswith(UNREMARKED)]


def _must_stay(key: str) -> bool:
    if key in MAY_CHANGE:
        return False
    return any(key.startswith(rule) if rule.endswith(".") else key == rule for rule in MUST_STAY)


def _flatten(prefix: str, tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value
