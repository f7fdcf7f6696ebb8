"""A plan as text: tables of what a run costs, its memory beside AdamW's and GaLore's, the cards it fits on, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ngpt.config.devices import GPUS, Gpu
from ngpt.config.optimizers import AdamWConfig, GaLoreConfig, LowRankConfig
from ngpt.config.schema import RunConfig, engine_of_launch
from ngpt.planning.fit import (
    CARDS_GB,
    CONTEXT,
    GIB,
    UNUSED,
    VISIBLE,
    fits,
    largest_micro_batch,
    needed,
    remedies,
    total_saved,
    what_fits,
)
from ngpt.planning.memory import KINDS, MemoryEstimate, estimate_memory
from ngpt.planning.parameters import KINDS as PARAMETER_KINDS
from ngpt.planning.parameters import parameters_of
from ngpt.planning.throughput import peak_of, work_of

WITHOUT_DEVICE = ("rtx4090", "a100", "h100")  # whose times are shown where no device was given


class Target(NamedTuple):
    """Where a run is planned: a known GPU, or None; GB of its memory, if known; processes; the assumed share of the peak rate."""

    gpu: Gpu | None
    gigabytes: float | None
    ranks: int
    mfu: float


def beside(config: RunConfig) -> dict[str, RunConfig]:
    """The run, and the same with AdamW and with GaLore where it has neither; moments and the mode of updates are the run's."""
    optimizer = config.optimizer
    shared: dict[str, Any] = {"state_dtype": optimizer.state_dtype, "apply": optimizer.apply}
    rank = optimizer.rank if isinstance(optimizer, LowRankConfig) else max(1, config.model.hidden_size // 4)
    others = {"adamw": AdamWConfig(**shared), "galore": GaLoreConfig(rank=rank, **shared)}
    columns = {optimizer.name: config}
    return columns | {name: dataclasses.replace(config, optimizer=other) for name, other in others.items() if name not in columns}


def plan_page(config: RunConfig, target: Target) -> str:
    """The whole plan."""
    columns = {name: estimate_memory(each, ranks=target.ranks) for name, each in beside(config).items()}
    own = columns[config.optimizer.name]
    sections = [
        _work(config, target),
        _memory(config, columns, target),
        _cards(config, columns, target),
        _remedies(config, own, target),
        f"Counted: tensors of one update, at its peak. Assumed on top for a card: {CONTEXT / GIB:.2f} GiB for CUDA, libraries and "
        f"workspaces,\n{UNUSED:.0%} that the allocator leaves unused, {1 - VISIBLE:.1%} of the memory on the box that programs do not get."
        " Nothing was allocated.",
    ]
    return "\n\n".join(sections)


def short_plan(estimate: MemoryEstimate) -> str:
    """One line for the start of a run."""
    sizes = ", ".join(f"{kind} {_size(size)}" for kind, size in estimate.peak.sizes.items() if size >= 0.005 * estimate.peak.total)
    return f"planned peak {_size(estimate.peak.total)} of tensors ({sizes}), at {estimate.peak.name}"


def against_plan(estimate: MemoryEstimate, measured: float) -> str:
    """The highest memory of tensors that a device has had, beside the plan."""
    planned = estimate.peak.total
    return f"peak of tensors so far {_size(measured)}, planned {_size(planned)} ({measured / planned - 1:+.1%})"


# ------------------------------------------------------------------------------------------------------------------ the work
def _work(config: RunConfig, target: Target) -> str:
    trainer, work = config.trainer, work_of(config)
    parameters = parameters_of(config)
    by_kind = {kind: sum(p.numel for p in parameters if p.kind == kind) for kind in PARAMETER_KINDS}
    trained = sum(p.numel for p in parameters if p.settings is not None)
    projected = sum(p.numel for p in parameters if p.settings is not None and "rank" in p.settings)
    total = sum(by_kind.values())
    kinds = ", ".join(f"{kind} {_count(size)}" for kind, size in by_kind.items() if size)
    notes = (f"; {_count(trained)} trained" if trained < total else "") + (f"; {_count(projected)} projected" if projected else "")
    accumulation = trainer.global_batch_size // (trainer.micro_batch_size * target.ranks)
    ranks = f"{target.ranks} process" + ("es" if target.ranks > 1 else "")
    step_tokens = trainer.global_batch_size * trainer.seq_len
    rows = [
        ("model", f"{config.model.name}, {config.optimizer.name}, {trainer.precision}, {_engine(config, target.ranks)}"),
        ("parameters", f"{total:,}: {kinds}{notes}"),
        (
            "batch",
            f"{trainer.global_batch_size} sequences = {trainer.micro_batch_size} (micro-batch) x {accumulation} (accumulated) x {ranks}; "
            f"x {trainer.seq_len} = {step_tokens:,} tokens a step",
        ),
        ("run", f"{work.steps:,} steps, {work.tokens:,} tokens"),
        ("operations", f"{work.flops:.2e} FLOP, {_count(work.flops_per_token, 'FLOP')} a token" + _recomputed(work.recomputed_per_token)),
        *_time_rows(config, target),
    ]
    return _aligned(rows)


def _time_rows(config: RunConfig, target: Target) -> Iterator[tuple[str, str]]:
    work = work_of(config)
    known = [target.gpu] if target.gpu else [gpu for gpu in GPUS if gpu.key in WITHOUT_DEVICE]
    times = []
    for gpu in known:
        peak = peak_of(config, gpu)
        seconds = work.seconds(peak, mfu=target.mfu, ranks=target.ranks)
        times.append(f"{duration(seconds)} on {target.ranks} x {gpu.key} ({peak / 1e12:.0f} TFLOP/s)")
    yield "time", "; ".join(times)
    precision = "fp32 without tensor cores" if config.trainer.precision == "fp32" else "dense bf16"
    yield "", f"if {target.mfu:.0%} of the peak ({precision}) is reached: assumed, not measured; small models reach less. throughput/mfu of"
    yield "", "a few steps says what your device does; give it with --mfu"


def _recomputed(per_token: int) -> str:
    return f"; {_count(per_token, 'FLOP')} recomputed on top" if per_token else ""


def _engine(config: RunConfig, ranks: int) -> str:
    if engine_of_launch(config.engine, ranks) == "local":
        return "one process"
    return f"ZeRO stage {config.engine.zero_stage} on {ranks} processes"


# ---------------------------------------------------------------------------------------------------------------- the memory
def _memory(config: RunConfig, columns: dict[str, MemoryEstimate], target: Target) -> str:
    names = list(columns)
    head = ["GiB per GPU at the peak" if target.ranks > 1 else "GiB at the peak", *names]
    rows = [head]
    for kind in KINDS:
        sizes = [estimate.peak.sizes[kind] for estimate in columns.values()]
        if any(sizes):
            rows.append([_named(kind, config), *map(_gib, sizes)])
        if kind == "optimizer state":
            rows += [
                [f"  {part}", *(_gib(estimate.state[part]) for estimate in columns.values())]
                for part in next(iter(columns.values())).state
                if any(estimate.state[part] >= 0.005 * GIB for estimate in columns.values())
            ]
    rows.append(["peak", *(_gib(estimate.peak.total) for estimate in columns.values())])
    rows.append(["peak of gradients", *(_gib(estimate.largest["gradients"]) for estimate in columns.values())])
    where = "\n".join(f"peak of {name}: {estimate.peak.name}" for name, estimate in columns.items())
    return f"{_table(rows)}\n{where}"


def _named(kind: str, config: RunConfig) -> str:
    trainer = config.trainer
    notes = {
        "gradients": f"apply={config.optimizer.apply}",
        "activations": f"{trainer.micro_batch_size} x {trainer.seq_len}, checkpointing {trainer.activation_checkpointing}",
        "logits": f"chunks of {min(trainer.loss_chunk_tokens, trainer.micro_batch_size * trainer.seq_len)}",
    }
    return f"{kind} ({notes[kind]})" if kind in notes else kind


def _cards(config: RunConfig, columns: dict[str, MemoryEstimate], target: Target) -> str:
    sizes: list[float] = sorted({*CARDS_GB, *([target.gigabytes] if target.gigabytes else [])})
    rows = [["card of", *(f"{size:g} GB" for size in sizes)]]
    for name, each in beside(config).items():
        rows.append([f"{name} fits", *("yes" if fits(columns[name], size) else "no" for size in sizes)])
        largest = [largest_micro_batch(each, size, ranks=target.ranks) for size in sizes]
        rows.append(["  largest micro-batch", *(str(size) if size else "-" for size in largest)])
    return _table(rows)


def _remedies(config: RunConfig, own: MemoryEstimate, target: Target) -> str:
    lines = [f"needs {_gib(needed(own))} GiB of a card: {_gib(own.peak.total)} of tensors and what comes on top"]
    if target.gigabytes:
        enough = fits(own, target.gigabytes)
        lines = [f"a card of {target.gigabytes:g} GB is {'enough' if enough else 'too small'}: {lines[0]}"]
        if not enough:
            lines += _together(config, target)
    found = remedies(config, ranks=target.ranks)
    if found:
        lines.append("what lowers the peak, each by itself:")
        rows = [[f"  {r.overrides}", f"-{_gib(r.saved)} GiB", r.price + ("" if r.same else " (another training)")] for r in found]
        lines.append(_table(rows, numbers=1))
    return "\n".join(lines)


def _together(config: RunConfig, target: Target) -> list[str]:
    assert target.gigabytes is not None
    taken, estimate = what_fits(config, target.gigabytes, ranks=target.ranks)
    overrides = " ".join(remedy.overrides for remedy in taken)
    if fits(estimate, target.gigabytes):
        changed = "" if all(remedy.same for remedy in taken) else ", another training"
        saved = f"{_gib(total_saved(taken))} GiB less{changed}"
        return [f"it would fit with: {overrides}", f"  ({_gib(needed(estimate))} GiB of the card)" + (f", {saved}" if changed else "")]
    return ["no settings make it fit: take a smaller model, a larger card or more processes with engine.zero_stage=3"]


# ------------------------------------------------------------------------------------------------------------------ the form
def _gib(size: float) -> str:
    value = size / GIB
    return f"{value:.2f}" if value < 99.995 else f"{value:,.0f}"


def _size(size: float) -> str:
    return f"{_gib(size)} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _count(number: float, unit: str = "") -> str:
    """1.34 G, 65.5 M."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Two figures of the largest fitting unit."""
    for size, name in ((86400 * 365, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} seconds"


def _aligned(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def _table(rows: Sequence[Sequence[str]], *, numbers: int | None = None) -> str:
    """Columns to the right but for the first, or only column `numbers`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def cell(column: int, text: str) -> str:
        right = column == numbers if numbers is not None else column > 0
        return text.rjust(widths[column]) if right else text.ljust(widths[column])

    return "\n".join("  ".join(cell(column, text) for column, text in enumerate(row)).rstrip() for row in rows)
