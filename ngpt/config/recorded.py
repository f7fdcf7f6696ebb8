"""config.yaml of a run folder or a checkpoint, read back as the typed configuration that it records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ngpt.config.schema import GROUPS, RunConfig, RunSectionConfig


class NotRecorded(ValueError):
    """A config.yaml is missing, broken, or not one that a run has written."""


def read_recorded_config(path: Path) -> RunConfig:
    """The settings that a run has recorded. Settings that are younger than the run have their defaults.

    Raises:
        NotRecorded: the file is missing or broken, or has settings of the model that this version does not know.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        sections = {group: _section(group, tree[group]) for group in GROUPS}
        own = {field.name: tree[field.name] for field in dataclasses.fields(RunConfig) if field.name in ("seed", "resume")}
        return RunConfig(**sections, run=RunSectionConfig(**tree["run"]), **own)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise NotRecorded(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise NotRecorded(f"{path} is not what a run of this project has recorded: {error}") from error


def _section(group: str, values: Mapping[str, Any]) -> Any:
    """A group's dataclass: of the variant that `name` says, where there are several."""
    variants = GROUPS[group]
    schema = next(iter(variants.values())) if len(variants) == 1 else variants[values["name"]]
    names = {field.name for field in dataclasses.fields(schema)}
    if group == "model" and (unknown := sorted(values.keys() - names)):
        raise ValueError(f"model.{unknown[0]} is not known to this version")
    return schema(**{name: value for name, value in values.items() if name in names})
