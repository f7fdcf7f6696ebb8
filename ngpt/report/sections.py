"""What is said of runs: the sections of a report, from the histories of its runs."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from ngpt.config.durations import clock
from ngpt.report.charts import loss_content, memory_content, optimisation_content, speed_content
from ngpt.report.measures import peak_gib, planned_steps, training_seconds
from ngpt.report.parts import Part, Section, Table
from ngpt.report.runs import RunHistory
from ngpt.report.scales import figure
from ngpt.report.subspace import subspace_content

_FACT = "environment"
_MOST_EVENTS = 30
_NAMES_OF_A_RUN = {"run.name", "run.dir"}  # they differ between any two runs
_COUNTERS = (
    ("train/loss_spikes", "loss spikes"),
    ("train/rollbacks", "rollbacks"),
    ("optim/skipped_steps", "skipped updates"),
    ("data/bad_documents", "bad documents"),
    ("data/retries", "retries of downloads"),
)


def sections_of(runs: Sequence[RunHistory]) -> list[Section]:
    """All sections of a report on `runs`, in their order; none is empty."""
    sections = [
        Section("Results", _results(runs)),
        Section("Loss and perplexity", loss_content(runs)),
        Section("Learning rate and gradients", optimisation_content(runs)),
        Section("Speed", speed_content(runs)),
        Section("Memory", memory_content(runs)),
        Section("Subspace health", subspace_content(runs)),
        Section("Loss spikes and skipped updates", _events(runs)),
        Section("Configuration", _configuration(runs)),
        Section("Environment", _environment(runs)),
    ]
    return [section for section in sections if section.content]


# ----------------------------------------------------------------------------------------------------------------------- results
def _results(runs: Sequence[RunHistory]) -> list[Part]:
    columns = {
        "held-out loss": [figure(run.last("val/loss")) for run in runs],
        "best": [figure(min(run.series("val/loss")[1], default=None)) for run in runs],
        "perplexity": [figure(run.last("val/perplexity")) for run in runs],
        "bits a byte": [figure(run.last("val/bits_per_byte")) for run in runs],
        "train loss": [figure(run.last("train/loss")) for run in runs],
        "tokens": [_whole(run.last("tokens")) for run in runs],
        "time": [clock(seconds) if (seconds := training_seconds(run)) > 0 else "-" for run in runs],
        "tokens/s": [figure(_median(run, "throughput/tokens_per_sec"), 3) for run in runs],
        "peak memory, GiB": [figure(peak_gib(run)) for run in runs],
        "optimizer state, GiB": [figure(run.last("memory/optimizer_state_gib")) for run in runs],
        "steps": [_steps(run) for run in runs],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    rows = [[run.name, *cells] for run, cells in zip(runs, zip(*shown.values(), strict=True), strict=True)]
    best = frozenset(cell for name in ("held-out loss", "best") if name in shown for cell in _lowest(runs, name, [*shown].index(name) + 1))
    caption = (
        "The last values of each run: losses in nats a token, perplexity and bits a byte of the held-out text; best is the lowest "
        "held-out loss of any evaluation; time is that of training, and tokens/s the median of all records."
    )
    table = Table(["run", *shown], rows, caption, best=best)
    return [table, *_notes(runs)]


def _lowest(runs: Sequence[RunHistory], name: str, column: int) -> list[tuple[int, int]]:
    """The cell of the lowest value, where several runs have one."""
    values = [run.last("val/loss") if name == "held-out loss" else min(run.series("val/loss")[1], default=None) for run in runs]
    known = [value for value in values if value is not None]
    return [(values.index(min(known)), column)] if len(known) > 1 else []


def _steps(run: RunHistory) -> str:
    step, planned = int(run.last("step") or 0), planned_steps(run)
    return f"{step:,} of {planned:,}" if planned and step < planned else f"{step:,}"


def _notes(runs: Sequence[RunHistory]) -> list[str]:
    """What is missing or unfinished, each note once with the runs that it is about."""
    about: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            about.setdefault(note, []).append(run.name)
    lines = [note if len(names) == len(runs) == 1 else f"{note}: {', '.join(names)}" for note, names in about.items()]
    return [f"{line}." for line in lines] + [line for run in runs if (line := _unfinished(run))]


def _unfinished(run: RunHistory) -> str:
    """What is to be said of a run that has not come to its end."""
    step, planned = int(run.last("step") or 0), planned_steps(run)
    return f"{run.name} is not done: step {step:,} of {planned:,} ({100 * step // planned} %)." if planned and step < planned else ""


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _median(run: RunHistory, metric: str) -> float | None:
    values = run.series(metric)[1]
    return statistics.median(values) if values else None


# ------------------------------------------------------------------------------------------------------------------------ events
def _events(runs: Sequence[RunHistory]) -> list[Part]:
    if not any(run.records or run.events for run in runs):
        return []
    counters = [(metric, label) for metric, label in _COUNTERS if any(run.last(metric) for run in runs)]
    if not counters and not any(run.events for run in runs):
        return ["None: no loss spike, no skipped update, no bad document."]
    content: list[Part] = []
    if counters:
        rows = [[run.name, *(_whole(run.last(metric)) for metric, _ in counters)] for run in runs]
        content.append(Table(["run", *(label for _, label in counters)], rows, "How often, until the last record of each run."))
    rows = [
        [run.name, str(event["step"]), *(str(event.get(name, "-")) for name in ("what", "loss", "grad_norm"))]
        for run in runs
        for event in run.events
    ]
    if rows:
        more = (
            f" The first {_MOST_EVENTS} of {len(rows)}; loss_spikes.jsonl and nonfinite_steps.jsonl have all."
            if len(rows) > _MOST_EVENTS
            else ""
        )
        caption = f"What was noted, and which documents were in the batch stands in the files of the run folder.{more}"
        content.append(Table(["run", "step", "what", "loss", "gradient norm"], rows[:_MOST_EVENTS], caption, numbers=False))
    return content


# ----------------------------------------------------------------------------------------------------------------- configuration
def _configuration(runs: Sequence[RunHistory]) -> list[Part]:
    """What differs between runs, or all settings of a single one."""
    known = [run for run in runs if run.config]
    if not known:
        return []
    if len(known) == 1:
        rows = [[name, value] for name, value in _flat(known[0].config)]
        return [Table(["setting", "value"], rows, numbers=False, folded=f"All {len(rows)} settings of {known[0].name}")]
    settings = [dict(_flat(run.config)) for run in known]
    names = [name for name in dict.fromkeys(name for one in settings for name in one) if name not in _NAMES_OF_A_RUN]
    rows = [[name, *(one.get(name, "-") for one in settings)] for name in names if len({one.get(name) for one in settings}) > 1]
    if not rows:
        return ["All settings but the names of the runs are the same."]
    table = Table(["setting", *(run.name for run in known)], rows, "A dash: this kind of run has no such setting.", numbers=False)
    return [f"These {len(rows)} of {len(names)} settings differ between runs; all others are the same.", table]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its path, its value as it would be given on the command line."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


# ------------------------------------------------------------------------------------------------------------------- environment
def _environment(runs: Sequence[RunHistory]) -> list[Part]:
    known = [run for run in runs if run.starts]
    if not known:
        return []
    facts = [_facts(run) for run in known]
    names = list(dict.fromkeys(name for one in facts for name in one))
    shared = {name: facts[0].get(name, "-") for name in names if len({one.get(name, "-") for one in facts}) == 1}
    content: list[Part] = []
    if len(shared) < len(names):
        rows = [[name, *(one.get(name, "-") for one in facts)] for name in names if name not in shared]
        content.append(Table([_FACT, *(run.name for run in known)], rows, "Of each run, at its last start.", numbers=False))
    if shared:
        whose = "" if len(known) == 1 else " The same for all runs."
        content.append(
            Table([_FACT, "value"], [[name, value] for name, value in shared.items()], f"At the last start.{whose}", numbers=False)
        )
    commands = [[run.name, _command(run)] for run in known]
    content.append(Table(["run", "command"], commands, "As the run was started last; secrets are hidden.", numbers=False))
    return content


def _facts(run: RunHistory) -> dict[str, str]:
    start = run.starts[-1]
    git, versions = start.get("git"), start.get("versions")
    first = str(run.starts[0].get("time", "-")).replace("T", " ").replace("+00:00", " UTC")
    facts = {"first start": first, "starts": str(len(run.starts))}
    if start.get("resumed_from"):
        facts["continued from"] = str(start["resumed_from"])
    if isinstance(git, dict):
        facts["commit"] = f"{str(git.get('commit'))[:12]}{' with changes' if git.get('modified') else ''}"
    devices = run.last("throughput/tokens_per_sec"), run.last("throughput/tokens_per_sec_per_device")
    if devices[0] and devices[1]:
        facts["devices"] = f"{devices[0] / devices[1]:.0f}"
    facts |= {name: str(start[name]) for name in ("device", "platform") if start.get(name)}
    return facts | {str(name): str(version) for name, version in versions.items()} if isinstance(versions, dict) else facts


def _command(run: RunHistory) -> str:
    arguments = run.starts[-1].get("argv")
    return shlex.join(["python", "-m", "ngpt.train", *map(str, arguments if isinstance(arguments, list) else [])])
