"""The picture of a run: loss, perplexity and memory against tokens, drawn from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def plot_run(metrics_file: Path, picture: Path, *, title: str, references: dict[str, float] | None = None) -> None:
    """Draw `metrics_file` into the PNG `picture`.

    Args:
        references: name -> held-out perplexity of something to compare with, drawn as a level line.
    """
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss_axes, perplexity_axes, memory_axes = figure.subplots(1, 3)
    figure.suptitle(title, fontsize=11)
    unit, scale = _token_unit(records)

    for axes, quantity in ((loss_axes, "loss"), (perplexity_axes, "perplexity")):
        for split, style in (
            ("train", {"lw": 1.0, "color": "#9bb8d3"}),
            ("val", {"lw": 1.8, "color": "#c2410c", "marker": "o", "ms": 3.5}),
        ):
            tokens, values = _series(records, f"{split}/{quantity}", scale)
            axes.plot(tokens, values, label=split, **style)
    perplexity_axes.set_yscale("log")
    for name, value in (references or {}).items():
        perplexity_axes.axhline(value, color="#6b7280", ls="--", lw=1, label=f"{name} {value:.0f}")
    last = _series(records, "val/perplexity", scale)[1][-1:]
    loss_axes.set_title("loss, nats a token", fontsize=10)
    perplexity_axes.set_title("perplexity" + (f" (held out at the end: {last[0]:.1f})" if last else ""), fontsize=10)

    for name, color in (("weights", "#1d4ed8"), ("gradients", "#059669"), ("optimizer_state", "#b45309")):
        tokens, values = _series(records, f"memory/{name}_gib", scale)
        memory_axes.plot(tokens, [value * 1024 for value in values], label=name.replace("_", " "), color=color)
    memory_axes.set_title("memory, MiB", fontsize=10)
    memory_axes.set_ylim(bottom=0)

    for axes in (loss_axes, perplexity_axes, memory_axes):
        axes.set_xlabel(f"tokens, {unit}", fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


def _series(records: list[dict[str, Any]], name: str, scale: float) -> tuple[list[float], list[float]]:
    points = [(record["tokens"] / scale, record[name]) for record in records if record.get(name) is not None]
    return [point[0] for point in points], [point[1] for point in points]


def _token_unit(records: list[dict[str, Any]]) -> tuple[str, float]:
    most = max((record["tokens"] for record in records), default=0)
    return ("billions", 1e9) if most > 2e9 else ("millions", 1e6) if most > 2e6 else ("thousands", 1e3)
