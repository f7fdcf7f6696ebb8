"""The charts of loss, learning rate, gradients, speed and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ngpt.report.curves import smoothed, window_of
from ngpt.report.measures import against, peak_gib, seconds_at, tokens_at
from ngpt.report.parts import Bars, Chart, Legend, Line, Mark, Part, Table
from ngpt.report.runs import RunHistory
from ngpt.report.scales import figure
from ngpt.report.svg import beyond

TOKENS = "tokens"
_HELD_OUT_COLOUR = 1  # of a single run, whose training is drawn in colour 0
_MOST_RAW = 8  # runs of which lines are drawn as recorded too: more would hide each other
_FEWEST_FOR_ZOOM = 3  # evaluations in the last half
_WILD = 10.0  # highest by lowest value from which on an axis is logarithmic
_SMALL_GIB = 0.25  # below it, memory is shown in MiB


def charts_of(runs: Sequence[RunHistory], charts: Sequence[Chart]) -> list[Part]:
    """Those of `charts` that have anything to show, with the legend of several runs above them, and what lies beyond their edges said."""
    shown = [_with_edges(chart) for chart in charts if any(np.isfinite(line.y).any() for line in chart.lines)]
    return [*([Legend([run.name for run in runs])] if shown and len(runs) > 1 else []), *shown]


def metric_chart(
    runs: Sequence[RunHistory],
    metric: str,
    title: str,
    *,
    look: str = "line",
    scale: float = 1.0,
    log: bool = False,
    zero: bool = False,
    whole: bool = True,
) -> Chart:
    """One metric of all runs against tokens: with `look="smooth"` as recorded, thin, and smoothed above it."""
    lines: list[Line] = []
    window = 1
    raw = "thin" if len(runs) <= _MOST_RAW else "unseen"
    for colour, run in enumerate(runs):
        x, y = against(run, metric)
        own = window_of(len(x)) if look == "smooth" else 1
        if own > 1:
            lines += [Line(run.name, colour, x, y * scale, raw), Line(run.name, colour, *smoothed(x, y * scale, own), listed=False)]
        else:
            lines.append(Line(run.name, colour, x, y * scale, "line" if look == "smooth" else look))
        window = max(window, own)
    thin = "Thin: as recorded. Thick: m" if raw == "thin" else "M"
    note = f"{thin}edian of up to {window} records." if window > 1 else ""
    return Chart(title, TOKENS, lines, log=log, zero=zero, whole=whole, note=note)


# -------------------------------------------------------------------------------------------------------------------------- loss
def loss_content(runs: Sequence[RunHistory]) -> list[Part]:
    """Loss and perplexity, of training and held out."""
    return charts_of(runs, _loss_of_one(runs[0]) if len(runs) == 1 else _loss_of_several(runs))


def _loss_of_one(run: RunHistory) -> list[Chart]:
    """Training and held-out text in one chart."""
    marks, charts = _marks([run]), []
    for quantity, title in (("loss", "Loss, nats a token"), ("perplexity", "Perplexity")):
        train = metric_chart([run], f"train/{quantity}", title, look="smooth", log=quantity == "perplexity")
        held_out = Line("held out", _HELD_OUT_COLOUR, *against(run, f"val/{quantity}"), look="dots")
        lines = [*(dataclasses.replace(line, name="train") for line in train.lines), held_out]
        key = [("train", 0, "line"), ("held out", _HELD_OUT_COLOUR, "dots")]
        charts.append(Chart(title, TOKENS, lines, log=train.log, note=train.note, key=key, marks=marks if quantity == "loss" else ()))
    return [*charts, *_last_half(charts[0], "Loss in the last half, nats a token")]


def _loss_of_several(runs: Sequence[RunHistory]) -> list[Chart]:
    """A chart for each quantity, the held-out ones first: they compare."""
    train = metric_chart(runs, "train/loss", "Train loss, nats a token", look="smooth")
    held_out = metric_chart(runs, "val/loss", "Held-out loss, nats a token", look="dots")
    return [
        held_out,
        *_last_half(held_out, "Held-out loss in the last half, nats a token"),
        metric_chart(runs, "val/perplexity", "Held-out perplexity", look="dots", log=True),
        dataclasses.replace(train, marks=_marks(runs)),
        metric_chart(runs, "train/perplexity", "Train perplexity", look="smooth", log=True),
        _against_time(runs),
    ]


def _last_half(chart: Chart, title: str) -> list[Chart]:
    """The part of a chart in which runs that are close can be told apart; nothing where there is little to see."""
    half = max((float(line.x[-1]) for line in chart.lines if len(line.x)), default=0.0) / 2
    lines = [dataclasses.replace(line, x=line.x[line.x >= half], y=line.y[line.x >= half]) for line in chart.lines]
    evaluations = max((len(line.x) for line in lines if line.look == "dots"), default=0)
    if evaluations < _FEWEST_FOR_ZOOM:
        return []
    # Smoothed only: what was recorded can be seen in the whole chart.
    lines = [dataclasses.replace(line, look="unseen") if line.look == "thin" else line for line in lines]
    return [Chart(title, chart.x_title, lines, key=chart.key, note="The same values on a finer axis.")]


def _against_time(runs: Sequence[RunHistory]) -> Chart:
    """Held-out loss against hours of training: what a slower step costs."""
    lines = []
    for colour, run in enumerate(runs):
        steps, loss = against(run, "val/loss", axis="step")
        known, seconds = seconds_at(run)
        if len(steps) and len(known):
            lines.append(Line(run.name, colour, np.interp(steps, known, seconds), loss, "dots"))
    longest = max((float(line.x[-1]) for line in lines), default=0.0)
    unit, size = next(
        (unit, size) for unit, size in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0)) if longest >= 2 * size or size == 1
    )
    scaled = [dataclasses.replace(line, x=line.x / size) for line in lines]
    return Chart("Held-out loss against time, nats a token", f"{unit} of training", scaled)


def _marks(runs: Sequence[RunHistory]) -> list[Mark]:
    """Loss spikes and skipped updates at the tokens where they happened."""
    found = [
        (tokens_at(run, event["step"]), colour, f"{run.name}, step {event['step']}: {event.get('what')}, loss {event.get('loss')}")
        for colour, run in enumerate(runs)
        for event in run.events
    ]
    return [Mark(place, colour, text) for place, colour, text in found if place is not None]


# ------------------------------------------------------------------------------------------------------------ rates, speed, memory
def optimisation_content(runs: Sequence[RunHistory]) -> list[Part]:
    """Learning rate and gradient norm."""
    norms = [value for run in runs for value in run.series("optim/grad_norm")[1] if value > 0]
    wild = bool(norms) and max(norms) > _WILD * min(norms)
    return charts_of(
        runs,
        [
            metric_chart(runs, "optim/lr", "Learning rate", zero=True),
            metric_chart(runs, "optim/grad_norm", "Gradient norm, before clipping", look="smooth", log=wild),
        ],
    )


def speed_content(runs: Sequence[RunHistory]) -> list[Part]:
    """Tokens a second, share of the device's peak, time lost to data and, over several ranks, bytes sent."""
    return charts_of(
        runs,
        [
            metric_chart(runs, "throughput/tokens_per_sec", "Tokens a second, all devices", look="smooth", zero=True),
            metric_chart(runs, "throughput/mfu", "Share of the device's peak FLOP/s, %", look="smooth", scale=100, zero=True),
            metric_chart(runs, "time/step_s", "Seconds a step", look="smooth", zero=True, whole=False),
            metric_chart(
                runs, "time/data_s", "Milliseconds a step that waited for data", look="smooth", scale=1000, zero=True, whole=False
            ),
            metric_chart(runs, "comm/bytes_per_step", "MB a step sent by a rank", scale=1e-6, zero=True),
        ],
    )


def memory_content(runs: Sequence[RunHistory]) -> list[Part]:
    """Exact bytes of tensors by kind, and what was measured."""
    parts = {name: label for name, label in _kinds(runs).items() if any(run.last(f"memory/{name}_gib") for run in runs)}
    if not parts:
        return []
    gib = [[max(run.series(f"memory/{name}_gib")[1], default=0.0) for name in parts] for run in runs]
    small = max(map(sum, gib)) < _SMALL_GIB
    values = [[value * (1024 if small else 1) for value in row] for row in gib]
    bars = Bars(
        "Weights, gradients and optimizer state",
        [run.name for run in runs],
        list(parts.values()),
        values,
        "MiB" if small else "GiB",
        note="Exact bytes of the tensors, each kind at its largest.",
    )
    in_use = metric_chart(runs, "memory/allocated_gib", "Memory in use, GiB", zero=True)
    rows = [[run.name, figure(peak_gib(run)), figure(max(run.series("memory/peak_reserved_gib")[1], default=None))] for run in runs]
    measured = Table(
        ["run", "peak in use, GiB", "peak reserved, GiB"],
        rows,
        "Measured peaks of one device: the CUDA allocator's, or on a CPU the resident set of the process, Python and libraries included.",
    )
    return [*charts_of(runs, [in_use]), bars, measured]


def _kinds(runs: Sequence[RunHistory]) -> dict[str, str]:
    """Metric and name of each kind of memory; the optimizer's state by its parts, where they were recorded."""
    prefix, suffix = "memory/optimizer_", "_gib"
    first = [next((record for record in run.records if "memory/weights_gib" in record), {}) for run in runs]
    names = dict.fromkeys(name for record in first for name in record if name.startswith(prefix))
    found = [name.removeprefix(prefix).removesuffix(suffix) for name in names if name != f"{prefix}state{suffix}"]
    whole = {} if found else {"optimizer_state": "optimizer state"}
    return {"weights": "weights", "gradients": "gradients"} | {f"optimizer_{part}": f"optimizer: {part}" for part in found} | whole


# ------------------------------------------------------------------------------------------------------------------------ pieces
def _with_edges(chart: Chart) -> Chart:
    count, highest = beyond(chart)
    if not count:
        return chart
    note = f"{chart.note} {count} {'value lies' if count == 1 else 'values lie'} above the upper edge, the highest at {figure(highest)}."
    return dataclasses.replace(chart, note=note.strip())
