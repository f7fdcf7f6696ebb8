"""The race's results as a Markdown table and two plots for each protocol: report.md, loss_*.png and state_*.png in the race's folder."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, mode
from typing import Any

PROTOCOL = ("model", "vocab_size", "seq_len", "batch_tokens", "steps", "rest_rate", "products", "compiled", "data")
_CURVES = 12  # of the best methods, in one plot
Result = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """One method under one protocol: all runs at the rate that was best for the sweep's seed."""

    name: str
    rate: float
    runs: list[Result]
    sweep: dict[float, float]  # rate -> final loss, of the seed that ran most rates

    @property
    def losses(self) -> list[float]:
        return [final_loss(run) for run in self.runs]

    @property
    def loss(self) -> float:
        return mean(self.losses)

    @property
    def spread(self) -> float:
        return max(self.losses) - min(self.losses)

    def curve(self) -> dict[int, float]:
        """Tokens -> held-out loss on the way, averaged over the runs."""
        return {points[0][0]: mean(loss for _, loss in points) for points in zip(*(run["curve"] for run in self.runs), strict=True)}

    def average(self, key: str) -> float:
        return mean(run[key] for run in self.runs)


def final_loss(result: Result) -> float:
    """Held-out loss at the end; infinity if training diverged."""
    return math.inf if result["final_loss"] is None else result["final_loss"]


def load_results(folder: Path) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def standings(results: Iterable[Result]) -> list[Standing]:
    """Best mean loss first. The results are of one protocol."""
    by_method: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_method[result["settings"]["name"]].append(result)
    table = []
    for name, runs in by_method.items():
        swept = mode(run["settings"]["seed"] for run in runs)
        sweep = {run["settings"]["rate"]: final_loss(run) for run in runs if run["settings"]["seed"] == swept}
        best = min(sweep, key=lambda rate: sweep[rate])
        table.append(Standing(name, best, [run for run in runs if run["settings"]["rate"] == best], dict(sorted(sweep.items()))))
    return sorted(table, key=lambda standing: standing.loss)


def markdown(table: list[Standing]) -> str:
    """One row a method. Time is the processor's, relative to AdamW's median run where AdamW took part."""
    reference = next((row.average("seconds_per_step") for row in table if row.name == "adamw"), math.nan)
    lines = [
        "| method | rate | runs | held-out loss | spread | perplexity | state, KiB | of it matrices | time/AdamW | optimizer, ms | sweep |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        sweep = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in row.sweep.items())
        lines.append(
            f"| {row.name} | {row.rate:g} | {len(row.runs)} | {row.loss:.4f} | {row.spread:.4f} | {math.exp(row.loss):.2f} "
            f"| {row.average('state_bytes') / 1024:.0f} | {row.average('matrix_state_bytes') / 1024:.1f} "
            f"| {row.average('seconds_per_step') / reference:.2f} | {1e3 * row.average('optimizer_seconds_per_step'):.1f} | {sweep} |"
        )
    return "\n".join(lines)


def draw(table: list[Standing], folder: Path, label: str) -> None:
    """Loss against tokens of the best methods (beside AdamW's, if it ran), and final loss against the matrices' state of all."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    table = [row for row in table if math.isfinite(row.loss)]
    colours = dict(zip((row.name for row in table), itertools.cycle(colormaps["tab20"].colors), strict=False))
    curves, states = Figure(figsize=(9, 5)), Figure(figsize=(9, 5))
    axes = curves.subplots()
    baseline = next((row.curve() for row in table if row.name == "adamw"), None)
    for row in table[:_CURVES]:
        curve = row.curve()
        if baseline is not None:
            curve = {tokens: loss - baseline[tokens] for tokens, loss in curve.items()}
        axes.plot(list(curve), list(curve.values()), label=row.name, color=colours[row.name])
    axes.set(xlabel="tokens", ylabel="held-out loss, nats a token" + (", minus AdamW's" if baseline is not None else ""))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes = states.subplots()
    for row in table:
        x, below, above = row.average("matrix_state_bytes") / 1024, row.loss - min(row.losses), max(row.losses) - row.loss
        axes.errorbar([x], [row.loss], [[below], [above]], fmt="o", color=colours[row.name], label=row.name)
    axes.set(xlabel="state of the attention and MLP matrices, KiB", ylabel="final held-out loss, nats a token", xscale="symlog")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    for figure, name in ((curves, "loss"), (states, "state")):
        figure.savefig(folder / f"{name}_{label}.png", dpi=120, bbox_inches="tight")


def write_report(folder: Path) -> Path:
    """report.md and the plots, for every protocol that the folder has results of."""

    def protocol(result: Result) -> list[Any]:
        return [result["settings"][key] for key in PROTOCOL]

    sections = []
    for values, group in itertools.groupby(sorted(load_results(folder), key=protocol), key=protocol):
        results = list(group)
        settings = dict(zip(PROTOCOL, values, strict=True))
        label = "-".join(str(settings[key]) for key in PROTOCOL if key != "data")
        table = standings(results)
        commits = ", ".join(sorted({result["commit"] for result in results}))
        description = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "data")
        sections.append(f"## {description}\n\n{len(results)} runs, commits {commits}.\n\n{markdown(table)}\n")
        if importlib.util.find_spec("matplotlib"):
            draw(table, folder, label)
    report = folder / "report.md"
    report.write_text("\n".join(sections))
    return report
