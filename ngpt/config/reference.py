"""Writes docs/configuration.md from the schema and the files of conf/: `python -m ngpt.config.reference docs/configuration.md`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from ngpt.config.compose import CONF_DIR, group_choices
from ngpt.config.problems import shown
from ngpt.config.schema import GROUPS, RunConfig, RunSectionConfig

_INTRODUCTION = """\
# Configuration

Written by `make docs` from `ngpt/config/schema.py` and `conf/`; a test keeps it up to date.

A run is one choice per group and any number of settings:

```
python -m ngpt.train model=llama_130m optimizer=galore optimizer.rank=256 trainer.max_steps=20000
```

- `--cfg job` prints the whole configuration and stops; `--help` lists what is used most.
- An unknown setting is an error, with or without `+`, and so is a value that breaks a rule; all problems are listed at once, before
  anything is loaded.
- A list is written in quotes: `data.train_files='[a/*.json.gz,b/*.json.gz]'`. `null` means "not given".
- `-m` runs a sweep in one process, one run folder per job: `-m optimizer.lr=0.005,0.01`. On several processes
  `python -m ngpt.compare --launcher "torchrun ..."` starts one launch per job, and says at the end which job is better.
- The folder of a run is `run.dir`/`run.name`, and its `config.yaml` is what was run.
"""


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION, *(_group(group) for group in GROUPS), _experiments(), *_ungrouped()]
    return "\n".join(parts)


def _group(group: str) -> str:
    lines = [f"## {group}", "", *_choices(group)]
    variants = GROUPS[group]
    if len(variants) == 1:
        return "\n".join([*lines, "", *_table(f"{group}.", _fields(*variants.values())), ""])
    base = next(iter(variants.values())).__mro__[-2]
    common = _fields(base)
    defaults = {(field.name, _default(field)) for field in common}
    lines += ["", f"Whichever {group} is chosen:", "", *_table(f"{group}.", common)]
    for variant, schema in variants.items():
        own = [field for field in _fields(schema) if (field.name, _default(field)) not in defaults]
        if own:
            lines += ["", f"### {group}={variant}", "", *_table(f"{group}.", own)]
    return "\n".join([*lines, ""])


def _choices(group: str) -> Iterator[str]:
    for choice in group_choices(group):
        comments = [line[2:] for line in (CONF_DIR / group / f"{choice}.yaml").read_text().splitlines() if line.startswith("# ")]
        yield f"- `{group}={choice}`: {next(comment for comment in comments if not comment.startswith('@'))}"


def _experiments() -> str:
    return "\n".join(["## experiment", "", "Whole runs; each file says what it costs and what to expect.", "", *_choices("experiment"), ""])


def _ungrouped() -> Iterator[str]:
    alone = [field for field in _fields(RunConfig) if field.name not in (*GROUPS, "run")]
    yield "\n".join(["## run, seed, resume", "", *_table("run.", _fields(RunSectionConfig)), *_table("", alone)[2:], ""])


def _fields(schema: type) -> list[dataclasses.Field]:
    """The settings of a schema that one sets by hand: `name` of a group with variants only repeats the choice."""
    return [field for field in dataclasses.fields(schema) if "meaning" in field.metadata and len(field.metadata.get("choices", "ab")) > 1]


def _table(prefix: str, fields: list[dataclasses.Field]) -> list[str]:
    rows = [f"| `{prefix}{field.name}` | `{_default(field)}` | {field.metadata['meaning']} | {_values(field)} |" for field in fields]
    return ["| setting | default | meaning | values |", "|---|---|---|---|", *rows]


def _default(field: dataclasses.Field) -> str:
    return shown(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def _values(field: dataclasses.Field) -> str:
    if "choices" in field.metadata:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    return ", ".join(f"{word} {field.metadata[bound]}" for bound, word in words.items() if bound in field.metadata)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(configuration_page())
