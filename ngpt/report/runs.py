"""Runs read back from their folders: records, settings, manifest and events, as far as they are there and whole."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

RECORDS = "metrics.jsonl"
EVENTS = ("loss_spikes.jsonl", "nonfinite_steps.jsonl")
_AT_ONCE = 4096  # lines
_FILES_OF_A_RUN = (RECORDS, "config.yaml", "manifest.json")
_DEEPEST = 4  # levels below a folder of runs at which runs are looked for: sweeps and comparisons have folders of their own


class ReportError(ValueError):
    """Something to report on is not there: which folder, what was looked for, and what to give instead."""


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """One run as its folder tells it.

    Attributes:
        name: of the run, as its settings say it, or of the folder.
        folder: where it was read from.
        config: the settings, nested; empty where the file is missing or broken.
        manifest: `starts`, a list with an entry for every start (ngpt/telemetry/manifest.py); empty likewise.
        records: of metrics.jsonl in the order of their steps, each with `step`; steps that a resumed run did again stand there once.
        events: loss spikes and skipped updates in the order of their steps: `step`, `what`, `loss`, `grad_norm`.
        notes: what is missing or broken, each a sentence.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    records: list[dict[str, Any]]
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; values that are missing or not finite are left out."""
        having = [record for record in self.records if metric in record]
        values = as_numbers([record[metric] for record in having])
        known = np.isfinite(values)
        return [record["step"] for record, keep in zip(having, known.tolist(), strict=True) if keep], values[known].tolist()

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric, if it has any."""
        return next((value for record in reversed(self.records) if (value := finite(record.get(metric))) is not None), None)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The entries of the manifest, the first start first."""
        starts = self.manifest.get("starts")
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def finite(value: object) -> float | None:
    """`value` as a number, if it is one and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def as_numbers(values: list[Any]) -> NDArray[np.float64]:
    """An array of what is in records; NaN for what is no finite number."""
    try:
        numbers = np.array(values, dtype=np.float64)  # None becomes NaN
    except (ValueError, TypeError, OverflowError):
        numbers = np.empty(())
    if numbers.shape != (len(values),):  # something else than numbers among them
        numbers = np.array([math.nan if (number := finite(value)) is None else number for value in values], dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, math.nan)


def read_run(folder: Path) -> RunHistory:
    """Read the run in `folder`, whether it is done, goes on, or was cut off at any byte.

    Raises:
        ReportError: there is no such folder, or nothing in it is a run's.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; give the folder of a run, <run.dir>/<run.name>, or one with several of them")
    if not _is_run(folder):
        raise ReportError(f"{folder}: no run (it has none of {', '.join(_FILES_OF_A_RUN)}); give <run.dir>/<run.name>")
    notes: list[str] = []
    config = _mapping(folder / "config.yaml", yaml.safe_load, notes)
    manifest = _mapping(folder / "manifest.json", json.loads, notes)
    section = config.get("run")
    name = section.get("name") if isinstance(section, dict) else None
    records = _in_order(_json_lines(folder / RECORDS, notes))
    if not records:
        notes.append(f"{RECORDS} has no records yet")
    events = {
        (event["step"], str(event.get("what"))): event
        for file in EVENTS
        for event in _json_lines(folder / file, notes, missing_is_fine=True)
    }
    return RunHistory(
        name=str(name) if name else folder.resolve().name,
        folder=folder,
        config=config,
        manifest=manifest,
        records=records,
        events=[events[key] for key in sorted(events)],
        notes=notes,
    )


def find_runs(paths: Sequence[Path]) -> list[RunHistory]:
    """The runs at `paths`, each the folder of a run or a folder with runs somewhere in it; no run twice, no name twice.

    Raises:
        ReportError: one of them is not there or has no run in it.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir() and not _is_run(path):
            below = list(_runs_below(path, _DEEPEST))
            if not below:
                raise ReportError(f"{path}: no run in it (a folder with {RECORDS}); give <run.dir>/<run.name>")
        else:
            below = [path.parent if path.name == RECORDS else path]
        folders.update({folder.resolve(): folder for folder in below if folder.resolve() not in folders})
    return with_unique_names([read_run(folder) for folder in folders.values()])


def with_unique_names(runs: Sequence[RunHistory]) -> list[RunHistory]:
    """The same runs, with names told apart by their folders, and by a number where those are the same too."""
    names = [run.name for run in runs]
    given: set[str] = set()
    result = []
    for run in runs:
        name = run.name if names.count(run.name) == 1 else f"{run.folder.resolve().parent.name}/{run.name}"
        number = 2
        unique = name
        while unique in given:
            unique, number = f"{name} ({number})", number + 1
        given.add(unique)
        result.append(dataclasses.replace(run, name=unique))
    return result


# ------------------------------------------------------------------------------------------------------------------------ files
def _is_run(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _FILES_OF_A_RUN)


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    inner_folders = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for inner in sorted(inner_folders, key=_natural):
        if _is_run(inner):
            yield inner
        elif levels > 1:
            yield from _runs_below(inner, levels - 1)


def _natural(path: Path) -> list[tuple[int, str]]:
    """The order of a person: run2 before run10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", path.name)]


def _mapping(path: Path, parse: Any, notes: list[str]) -> dict[str, Any]:
    """The mapping in a file of YAML or JSON; empty, with a note, where there is none."""
    try:
        content = parse(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} is not a mapping")
        return {}
    return content


def _json_lines(path: Path, notes: list[str], *, missing_is_fine: bool = False) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines that have a step. A last line without its end is being written, and no mistake."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if not missing_is_fine:
            notes.append(f"{path.name} is missing")
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return []
    lines = text.split("\n")
    whole = [line for line in lines[:-1] if line.strip()]
    found = [item for first in range(0, len(whole), _AT_ONCE) for item in _objects(whole[first : first + _AT_ONCE])]
    broken = sum(item is None for item in found)
    if broken:
        notes.append(f"{broken} {'line' if broken == 1 else 'lines'} of {path.name} could not be read and left out")
    found += _objects(lines[-1:])
    return [item for item in found if item is not None]


def _objects(lines: list[str]) -> list[dict[str, Any] | None]:
    """The object of each line; None for what is none, or has no step. Read together, they share the strings of their names."""
    try:
        items = json.loads(f"[{','.join(lines)}]")
        if len(items) != len(lines):  # a line with a comma of its own
            raise ValueError
    except (ValueError, RecursionError):
        items = [_object(line) for line in lines]
    for item in items:
        if isinstance(item, dict) and finite(item.get("step")) is not None:
            item["step"] = int(item["step"])
    return [item if isinstance(item, dict) and isinstance(item.get("step"), int) else None for item in items]


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without those that a later start went back behind and wrote again."""
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        kept.append(record)
    return kept
