"""Our optimizers under ZeRO against AdamW under DeepSpeed's own: step time, bytes on the wire, memory; and whose gradients are alive.

    python -m bench.zero --model 60m --ranks 2 --stages 0,1,2,3 --rounds 9
    python -m bench.zero --model 60m --ranks 2 --gradients
    python -m bench.zero --model 1b --ranks 1 --device cuda --rows 8 --seq-len 1024

Starts its own processes, one for each rank: gloo on CPUs, NCCL on GPUs. At each stage all contenders live in the same processes and
take their steps in turn. Batches are noise and, unless told otherwise, short, so that what is compared is not hidden behind forward and
backward. Timed steps are away from a refresh. Bytes are counted in other steps than those that are timed, by the ring algorithms. Prints
tables and what became of the targets, for bench/RECORDS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bench.presets import model_of
from bench.step_time import middle, ratios
from bench.zero_contenders import OURS, PEER, SUBSPACE_ONLY, Setup
from bench.zero_measurement import GradientPeaks, Measured, measure_gradients, measure_stage, on_ranks
from ngpt.config.schema import ModelConfig
from ngpt.model.cost import matrix_shapes

DEFAULT_GAP = 200  # updates between refreshes, optimizer.update_proj_gap
WIRE_MARGIN = 0.02
STATE_MARGIN = 0.01
Stage = dict[str, Measured]


# ------------------------------------------------------------------------------------------------------------- results
def of_all_ranks(results: list[dict[str, dict[str, Any]]]) -> Stage:
    """The largest of all ranks, number by number, as a step ends when the last rank has ended it."""
    return {
        name: Measured(**{key.name: _largest([result[name][key.name] for result in results]) for key in fields(Measured)})
        for name in results[0]
    }


def _largest(values: list[Any]) -> Any:
    return [max(of_round) for of_round in zip(*values, strict=True)] if isinstance(values[0], list) else max(values)


def thin_share(model: ModelConfig, rank: int) -> float:
    """r/m over the blocks' matrices: the numbers in their projected gradients, as a share of those in the gradients."""
    shapes = [sorted((matrix.rows, matrix.columns)) for matrix in matrix_shapes(model) if matrix.projected]
    return sum(min(rank, short) * long for short, long in shapes) / sum(short * long for short, long in shapes)


def wire_ratio(own: Measured, peer: Measured) -> float:
    """Bytes that are sent for the blocks' matrices, refreshes included, over the peer's; gathering weights is left out on both sides."""
    refresh = (own.matrices_sent_at_refresh - own.matrices_sent) / DEFAULT_GAP
    return (own.matrices_sent + refresh) / peer.matrices_sent if peer.matrices_sent else 0.0


def state_ratio(own: Measured, ranks: int) -> float:
    """The sharded state of a rank over its N-th part of all ranks' (1 where nothing is sharded)."""
    return own.sharded_state * ranks / own.sharded_state_of_all if own.sharded_state_of_all else 1.0


# -------------------------------------------------------------------------------------------------------------- tables
def time_table(stages: dict[int, Stage]) -> Iterator[str]:
    """Milliseconds of a step and of its two parts, with the ratio to the peer's in each round."""
    yield "| stage | | ms a step | / DeepSpeed | forward and backward | / DeepSpeed | update | / DeepSpeed |"
    yield "|---|---|---|---|---|---|---|---|"
    for stage, measured in stages.items():
        for name, own in measured.items():
            cells = [f"| {stage} | {name} "]
            for part in ("step", "backward", "update"):
                times = {name: getattr(own, part), PEER: getattr(measured[PEER], part)}
                cells.append(f"| {middle(times[name], 1e3, 1)} | {middle(ratios(times, name, PEER))} ")
            yield "".join(cells) + "|"


def bytes_table(stages: dict[int, Stage], ranks: int) -> Iterator[str]:
    """What a rank sends and holds, in MiB."""
    yield (
        "| stage | | sent a step, MiB | for gradients and updates | / DeepSpeed | of the blocks' matrices | / DeepSpeed | at a refresh "
        "| peak, MiB | / DeepSpeed | between steps | state, MiB | sharded state / (total / N) | held whole |"
    )
    yield "|---|" + "---|" * 13
    for stage, measured in stages.items():
        peer = measured[PEER]
        for name, own in measured.items():
            cells = (
                f"{_mib(own.sent)} | {_mib(own.updates_sent)} | {_share(own.updates_sent, peer.updates_sent)}",
                f"{_mib(own.matrices_sent)} | {_share(own.matrices_sent, peer.matrices_sent)} | {_mib(own.matrices_sent_at_refresh)}",
                f"{_mib(own.peak)} | {_share(own.peak, peer.peak)} | {_mib(own.kept)} | {_mib(own.state)}",
                f"{state_ratio(own, ranks):.3f} | {_mib(own.state - own.sharded_state)}",
            )
            yield f"| {stage} | {name} | " + " | ".join(cells) + " |"


def targets(stages: dict[int, Stage], share: float, ranks: int) -> Iterator[str]:
    """A line for each target, stage and optimizer that works in the subspace alone."""
    for stage, measured in stages.items():
        peer = measured[PEER]
        for name in [name for name in SUBSPACE_ONLY if name in measured]:
            own = measured[name]
            where = f"- stage {stage}, {name}:"
            if peer.matrices_sent:
                ratio, limit = wire_ratio(own, peer), share + WIRE_MARGIN
                yield f"{where} bytes for the blocks' matrices {ratio:.3f} of DeepSpeed's (at most {limit:.3f}): {_met(ratio <= limit)}"
            if stage:
                ratio = state_ratio(own, ranks)
                yield f"{where} sharded state {ratio:.3f} of total / N (at most {1 + STATE_MARGIN}): {_met(ratio <= 1 + STATE_MARGIN)}"
            times = ratios({name: own.step, PEER: peer.step}, name, PEER)
            yield f"{where} step time {middle(times)} of DeepSpeed's (at most 1): {_met(statistics.median(times) <= 1)}"


def gradient_table(stages: dict[int, dict[str, dict[str, GradientPeaks]]], model: ModelConfig, item: int) -> Iterator[str]:
    """MiB of gradients on a rank, and whether one layer's full ones are the most."""
    matrices = sum(matrix.size for matrix in matrix_shapes(model) if matrix.projected)
    limit = matrices // model.num_hidden_layers * item
    yield (
        f"| stage | | | full gradients of matrices, MiB | at most one layer's ({_mib(limit)}) | held by the engine "
        "| all beyond weights and state |"
    )
    yield "|---|---|---|---|---|---|---|"
    for stage, methods in stages.items():
        for name, modes in methods.items():
            for mode, peaks in modes.items():
                cells = f"{_mib(peaks.full)} | {_met(peaks.full <= limit)} | {_mib(peaks.held)} | {_mib(peaks.tensors)}"
                yield f"| {stage} | {name} | {mode} | {cells} |"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _share(size: int, reference: int) -> str:
    return f"{size / reference:.3f}" if reference else "-"


def _met(holds: bool) -> str:
    return "met" if holds else "MISSED"


# ------------------------------------------------------------------------------------------------------------- command
def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.zero", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="60m", help="shape of conf/model/llama_SIZE.yaml (default 60m)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--stages", default="0,1,2,3", help="of ZeRO, separated by commas (default all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contender (default 9)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the projection (default 128)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a rank's batch (default 1)")
    parser.add_argument("--seq-len", type=int, default=32, help="tokens of a row (default 32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: fp32; cuda: bf16 (default cpu)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(OURS), default=list(OURS), help="these of our optimizers alone")
    parser.add_argument("--gradients", action="store_true", help="measure the gradients that are alive in place of time and wire (CPU)")
    parser.add_argument("--out", metavar="FILE", help="write everything that was measured there, as JSON")
    options = parser.parse_args(argv)
    try:
        options.stages = [int(stage) for stage in options.stages.split(",")]
    except ValueError:
        options.stages = []
    if not options.stages or not set(options.stages) <= {0, 1, 2, 3}:
        parser.error("--stages must be numbers from 0 to 3, separated by commas")
    if options.gradients and options.device != "cpu":
        parser.error("--gradients counts tensors on the CPU")
    return options


def heading(options: argparse.Namespace) -> str:
    """What a record has to say of where it comes from."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    model = f"{options.model}, rank {options.rank}, {options.ranks} ranks x {options.rows} x {options.seq_len} tokens"
    rounds = "" if options.gradients else f", n = {options.rounds}: median (lowest to highest of the middle four fifths)"
    return f"{model}, {device}, torch {torch.__version__}, commit {git.stdout.strip() or 'unknown'}{rounds}"


def main(argv: list[str] | None = None) -> None:
    """Measure every stage and print the tables."""
    options = arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the ranks
    model = model_of(options.model)
    print(heading(options), flush=True)
    setups = {stage: Setup(model, stage, options.rank, options.rows, options.seq_len, device=options.device) for stage in options.stages}
    if options.gradients:
        raw = {stage: on_ranks(options.ranks, "cpu", measure_gradients, setup, options.only) for stage, setup in setups.items()}
        peaks = {
            stage: {
                name: {mode: GradientPeaks(*map(max, zip(*(rank[name][mode] for rank in ranks), strict=True))) for mode in modes}
                for name, modes in ranks[0].items()
            }
            for stage, ranks in raw.items()
        }
        print("\n".join(["", *gradient_table(peaks, model, 4)]))
    else:
        names = [PEER, *options.only]
        raw = {
            stage: on_ranks(options.ranks, options.device, measure_stage, setup, names, options.rounds) for stage, setup in setups.items()
        }
        stages = {stage: of_all_ranks(results) for stage, results in raw.items()}
        share = thin_share(model, options.rank)
        parts = time_table(stages), bytes_table(stages, options.ranks), targets(stages, share, options.ranks)
        print("\n".join(line for part in parts for line in ["", *part]))
    if options.out:
        Path(options.out).write_text(json.dumps(raw), encoding="utf-8")


if __name__ == "__main__":
    main()
