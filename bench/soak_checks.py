"""What bench/soak.py asks of a run that was killed again and again: rows, records, memory, files, weights; answers are problems."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ngpt.checkpoint.integrity import problems, step_folders

SHOWN = 5  # problems of one kind
MEMORY_MAY_GROW = 24 << 20  # bytes over a whole run that allocators make more or less of; a tensor kept in each step is far above
SETTLED = 0.25  # of a process's steps, after which what is made once has been made
WILL_DIFFER = {"seconds", "wandb", "run.dir"}  # in state.json: a clock, an identifier drawn anew, and where the run lies
Step = dict[str, Any]


@dataclass
class Start:
    """What one start of one rank has recorded: the step it went on from, None if it did not come so far, and its steps."""

    number: int
    rank: int
    went_on_from: int | None = None
    ranks: int = 1
    steps: list[Step] = field(default_factory=list)


def read_starts(folder: Path, number: int | None = None) -> list[Start]:
    """All starts, or one, in their order, rank by rank."""
    found = []
    for path in sorted(folder.glob(f"start-{'*' if number is None else f'{number:04d}'}.rank-*.jsonl")):
        number, rank = path.name.removeprefix("start-").removesuffix(".jsonl").split(".rank-")
        start = Start(int(number), int(rank))
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # cut off by a kill
                break
            entry = json.loads(line)
            if "from" in entry:
                start.went_on_from, start.ranks = entry["from"], entry["ranks"]
            else:
                start.steps.append(entry)
        found.append(start)
    return found


@dataclass
class History:
    """The steps that the weights at the end are made of, by rank and step; and how many were taken, and lost again, beside them."""

    steps: dict[int, dict[int, Step]]
    repeated: int
    starts: int
    problems: list[str]


def surviving_history(starts: Sequence[Start]) -> History:
    """Each start goes on from a checkpoint: what earlier ones did after it is lost, and done again with the same rows and losses."""
    steps: dict[int, dict[int, Step]] = {}
    lost: dict[tuple[int, int], Step] = {}
    repeated, found = 0, []
    for start in starts:
        if start.went_on_from is None:
            continue
        kept = steps.setdefault(start.rank, {})
        for step in [step for step in kept if step > start.went_on_from]:
            lost[start.rank, step] = kept.pop(step)
        expected = start.went_on_from
        for entry in start.steps:
            expected += 1
            if entry["step"] != expected:
                found.append(f"start {start.number}, rank {start.rank}: step {entry['step']} came where {expected} was due")
                break
            before = lost.get((start.rank, expected))
            repeated += before is not None
            if before and any(before[name] != entry[name] for name in ("rows", "loss", "tokens")):
                found.append(f"start {start.number}, rank {start.rank}: step {expected} was not what it had been when it was first taken")
            kept[expected] = entry
    return History(steps, repeated, len({start.number for start in starts}), found)


def row_problems(history: History, batches: Iterator[tuple[int, list[int]]], *, steps: int, rows_a_step: int) -> list[str]:
    """Whether all ranks together were given each row of the uninterrupted stream once, in the step in which it belongs.

    Args:
        batches: first row and checksums of the rows of each batch of a loader that was never interrupted.
    """
    found = [f"rank {rank}: steps {sorted(set(range(1, steps + 1)) ^ set(taken))[:SHOWN]}... are missing or too many"
             for rank, taken in history.steps.items() if set(taken) != set(range(1, steps + 1))]  # fmt: skip
    expected: dict[int, int] = {}
    for step in range(1, steps + 1):
        while len(expected) < rows_a_step:
            first, sums = next(batches)
            expected |= {first + place: value for place, value in enumerate(sums)}
        taken: list[tuple[int, int]] = []
        for of_rank in history.steps.values():
            taken += [(first + place, value) for first, sums in of_rank.get(step, {"rows": []})["rows"] for place, value in enumerate(sums)]
        if sorted(taken) != sorted(expected.items()):
            rows = sorted(row for row, _ in taken)
            found.append(f"step {step} was made of rows {rows[:SHOWN]}... and not of {sorted(expected)[:SHOWN]}..., or of other tokens")
        expected = {}
    return found


def loss_problems(history: History, reference: History) -> list[str]:
    """Whether each step had the loss and the count of tokens of the uninterrupted run, to the last bit."""
    found = []
    for rank, steps in reference.steps.items():
        own = history.steps.get(rank, {})
        found += [
            f"rank {rank}, step {step}: {name} was {own.get(step, {}).get(name)}, and {entry[name]} without interruptions"
            for step, entry in steps.items()
            for name in ("loss", "tokens")
            if own.get(step, {}).get(name) != entry[name]
        ]
    return found


def metrics_problems(path: Path, reference: Path, *, steps: int, every: int, evaluated_every: int) -> list[str]:
    """Whether metrics.jsonl has each record once, in order, and the figures of the uninterrupted run."""
    found, records = [], _records(path)
    training = [record for record in records if "train/loss" in record]
    evaluations = [record["step"] for record in records if "val/loss" in record]
    order = [record["step"] for record in records]
    if order != sorted(order):
        found.append("metrics.jsonl: steps go back")
    regular = [record["step"] for record in training if record["step"] % every == 0]
    if regular != list(range(every, steps + 1, every)):
        found.append(f"metrics.jsonl: steps of training records are not {every}, {2 * every}, ... {steps}, each once")
    due = [step for step in range(1, steps + 1) if step == steps or (evaluated_every and step % evaluated_every == 0)]
    if evaluations != due:
        found.append(f"metrics.jsonl: evaluations after {evaluations[:SHOWN]}..., not after {due[:SHOWN]}...")
    if any(later["tokens"] < earlier["tokens"] for earlier, later in itertools.pairwise(records)):
        found.append("metrics.jsonl: tokens go back")
    names = ("tokens", "train/loss", "optim/lr", "optim/grad_norm", "optim/skipped_steps", "val/loss", "val/tokens")
    right = {(record["step"], "val/loss" in record): record for record in _records(reference)}
    for record in records:
        other = right.get((record["step"], "val/loss" in record))
        if other and [record.get(name) for name in names] != [other.get(name) for name in names]:
            found.append(f"metrics.jsonl: the record of step {record['step']} is not that of the uninterrupted run")
    return found


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------------- memory
def growth(places: Sequence[float], resident: Sequence[float]) -> float:
    """Bytes a place by which a straight line through the resident set rises; 0 for less than three points."""
    return float(np.polyfit(places, resident, 1)[0]) if len(places) > 2 else 0.0


@dataclass
class Memory:
    """The resident set of one rank, bytes: its largest; growth a step within the longest process; growth a start at the same age."""

    rank: int
    largest: int
    steps: int
    a_step: float
    starts: int
    a_start: float

    def problems(self) -> list[str]:
        """Whether it has grown."""
        found = []
        if self.a_step * self.steps * (1 - SETTLED) > MEMORY_MAY_GROW:
            found.append(f"rank {self.rank}: {self.a_step:.0f} bytes a step more over {self.steps} steps of one process")
        if self.a_start * self.starts > MEMORY_MAY_GROW:
            found.append(f"rank {self.rank}: each start began with {self.a_start / 1e3:.0f} kB more than the one before")
        return found


def memory_of(starts: Sequence[Start]) -> list[Memory]:
    """The memory of each rank over all its starts."""
    result = []
    for rank in sorted({start.rank for start in starts}):
        own = [start for start in starts if start.rank == rank and start.steps]
        longest = max(own, key=lambda start: len(start.steps)).steps
        settled = longest[int(SETTLED * len(longest)) :]
        age = int(np.median([len(start.steps) for start in own])) // 2
        old = [start for start in own if len(start.steps) > age]
        result.append(
            Memory(
                rank,
                max(step["resident"] for start in own for step in start.steps),
                len(longest),
                growth([step["step"] for step in settled], [step["resident"] for step in settled]),
                len(old),
                growth([start.number for start in old], [start.steps[age]["resident"] for start in old]),
            )
        )
    return result


# -------------------------------------------------------------------------------------------------------------------- files
def checkpoint_problems(folder: Path, *, keep: int, killed: bool) -> list[str]:
    """Whether all checkpoints that call themselves complete are what was saved, and there are no more of them than there should be."""
    complete = [checkpoint for checkpoint in step_folders(folder) if (checkpoint / ".complete").exists()]
    found = [problem for checkpoint in complete for problem in problems(checkpoint)]
    if len(complete) > keep + killed:  # a kill may come between a publication and the removal of the oldest
        found.append(f"{folder}: {len(complete)} checkpoints, though {keep} are kept")
    return found


def rubbish(run: Path, reference: Path, ranks: int) -> list[str]:
    """Files that the finished run has and the uninterrupted one has not; what ranks said, and their stacks, are for people.

    A torchrun that was killed leaves its own folder of temporary files, which is none of ours.
    """
    allowed = {f"{name}.rank-{rank}.log" for rank in range(ranks) for name in ("stacks", "train")}
    own, other = (
        {re.sub(r"/step-\d+(?=/|$)", "/step-N", path.relative_to(root).as_posix()) for path in root.rglob("*")} for root in (run, reference)
    )
    left, missing = (
        sorted(name for name in names - allowed if not name.startswith("torchelastic_")) for names in (own - other, other - own)
    )
    return [f"{run / name} was left behind" for name in left] + [
        f"{run / name} is not there, though the uninterrupted run has it" for name in missing
    ]


def result_problems(checkpoint: Path, reference: Path) -> list[str]:
    """Whether weights, optimizer state, generators and progress are those of the uninterrupted run, bit for bit."""
    found = []
    files = sorted(path.name for path in reference.glob("*.safetensors"))
    for name in files:
        own, other = load_file(checkpoint / name), load_file(reference / name)
        if own.keys() != other.keys():
            found.append(f"{name}: it has other tensors than the uninterrupted run's")
        found += [
            f"{name}: {key} is not the uninterrupted run's" for key in own.keys() & other.keys() if not _same_bits(own[key], other[key])
        ]
    if not files:
        found.append(f"{reference} has no tensors to compare with")
    mine, theirs = (json.loads((folder / "state.json").read_text()) for folder in (checkpoint, reference))
    if _without_clocks(mine) != _without_clocks(theirs):
        found.append("state.json: progress or the place in the data is not the uninterrupted run's")
    return found


def _same_bits(own: torch.Tensor, other: torch.Tensor) -> bool:
    if own.dtype != other.dtype or own.shape != other.shape:
        return False
    return torch.equal(own.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _without_clocks(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _without_clocks(value) for name, value in tree.items() if name not in WILL_DIFFER}
    return tree


def shortened(found: Iterable[str]) -> list[str]:
    """The first few problems, and how many more there are."""
    found = list(found)
    return found[:SHOWN] + ([f"and {len(found) - SHOWN} more of this kind"] if len(found) > SHOWN else [])
