"""Time of an optimizer's step, of a refresh of the subspace, and of every step of a staggered run, in one process and in turn.

    python -m bench.step_time steps --size 60m --rank 128
    python -m bench.step_time refresh --size 1b --rank 512 --train-steps 10 --files 'text/*.json.gz' --tokenizer tokenizer.model
    python -m bench.step_time stagger --size 60m --rank 128 --files 'text/*.json.gz' --tokenizer tokenizer.model

Everything that is compared takes its turn within each repetition, in a new random order, so that what else the machine does hits all
alike. `steps` are steps away from a refresh on gradients of noise, whose values do not matter there; `refresh` and `stagger`
take gradients of a small model of these shapes in training on real text. Prints tables for bench/RECORDS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from bench.contenders import CONTENDERS, construct_all
from bench.presets import block_shapes, model_of
from bench.real_gradients import real_gradients
from ngpt import optim
from ngpt.data.tokenizer import Tokenizer
from ngpt.optim.projection import find_basis, short_side_first

REFERENCE = "galore-torch"
WARM_UP = 2  # steps before the measured ones: the first finds the basis, the second finds every buffer allocated


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of one call, the accelerator's part included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def in_turn(works: Mapping[str, Callable[[], object]], repetitions: int, device: str) -> dict[str, list[float]]:
    """Seconds of each work in each repetition; all works take their turn in every repetition, in an order drawn anew."""
    times: dict[str, list[float]] = {name: [] for name in works}
    order, shuffle = list(works), random.Random(0).shuffle
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            times[name].append(seconds(works[name], device))
    return times


def middle(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median and, in brackets, the lowest and the highest of the middle four fifths."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    low, high = ordered[cut], ordered[-1 - cut]
    return f"{statistics.median(values) * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"


def ratios(times: dict[str, list[float]], name: str, reference: str) -> list[float]:
    """The ratio of two works' times in each repetition."""
    return [own / other for own, other in zip(times[name], times[reference], strict=True)]


# --------------------------------------------------------------------------------------------------------------- steps
def parameters_like(gradients: list[Tensor]) -> list[Tensor]:
    """Fresh parameters that share these gradients: no optimizer writes to a gradient."""
    params = []
    for gradient in gradients:
        p = torch.nn.Parameter(torch.randn_like(gradient) * 0.02)
        p.grad = gradient
        params.append(p)
    return params


def measure_steps(
    shapes: list[tuple[int, int]], rank: int, names: list[str], *, repetitions: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of each optimizer's steps away from a refresh, and a line for each that was not measured."""
    torch.manual_seed(0)
    gradients = [torch.randn(shape, dtype=dtype, device=device) * 1e-3 for shape in shapes]
    built, missing = construct_all(names, lambda: parameters_like(gradients), rank)
    for name in list(built):
        try:
            for _ in range(WARM_UP):
                built[name].step()
        except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
            missing.append(f"{name}: not measured, its step raises {type(error).__name__}: {error}")
            del built[name]
    return in_turn({name: optimizer.step for name, optimizer in built.items()}, repetitions, device), missing


def steps_table(times: dict[str, list[float]], references: tuple[str, ...] = ("torch AdamW, foreach", REFERENCE)) -> Iterator[str]:
    """A row for each optimizer: milliseconds, and its ratio to each reference that was measured."""
    references = tuple(name for name in references if name in times)
    yield "| | ms a step | " + "".join(f"/ {name} | " for name in references)
    yield "|---|" + "---|" * (1 + len(references))
    for name, values in times.items():
        yield f"| {name} | {middle(values, 1e3)} | " + "".join(f"{middle(ratios(times, name, other))} | " for other in references)


# ------------------------------------------------------------------------------------------------------------- refresh
Ways = dict[str, tuple[list[float], float]]  # of finding a basis: seconds, energy that it catches relative to the exact one


def measure_refresh(before_ab: Tensor, grad_ab: Tensor, rank: int, *, repetitions: int, device: str) -> Ways:
    """Seconds of finding a basis in each way, and the gradient energy that it catches relative to that of the exact one.

    `warm` starts from the exact basis of `before_ab`, the same matrix's gradient earlier in training.
    """
    bases: dict[str, Tensor] = {}
    old_ar = find_basis(before_ab, rank, subspace="svd", previous_ar=None, generator=torch.Generator(device))

    def find(name: str, subspace: str, previous_ar: Tensor | None) -> Callable[[], None]:
        def work() -> None:
            generator = torch.Generator(device).manual_seed(0)
            basis_ar = find_basis(grad_ab, rank, subspace=subspace, previous_ar=previous_ar, generator=generator)
            assert basis_ar is not None, "this gradient is zero or not finite"
            bases[name] = basis_ar

        return work

    works = {
        "svd": find("svd", "svd", None),
        "randomized, cold": find("randomized, cold", "randomized", None),
        "randomized, warm": find("randomized, warm", "randomized", old_ar),
    }
    times = in_turn(works, repetitions, device)
    energy = {name: (basis_ar.double().mT @ grad_ab.double()).square().sum() for name, basis_ar in bases.items()}
    return {name: (times[name], float(energy[name] / energy["svd"])) for name in works}


def refresh_table(results: dict[str, Ways]) -> Iterator[str]:
    """A row for each matrix and way: seconds, time relative to the exact SVD, energy relative to the exact basis."""
    yield "| matrix | basis | seconds | / svd | energy / svd's |"
    yield "|---|---|---|---|---|"
    for matrix, ways in results.items():
        times = {name: values for name, (values, _) in ways.items()}
        for name, (values, energy) in ways.items():
            ratio = middle(ratios(times, name, "svd"), digits=3)
            yield f"| {matrix} | {name} | {middle(values, digits=3)} | {ratio} | {energy:.4f} |"


# ------------------------------------------------------------------------------------------------------------- stagger
def measure_gap(
    snapshots: list[list[Tensor]], rank: int, gap: int, methods: dict[str, dict[str, object]], *, repetitions: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each of the `gap` first steps of NaturalGaLore with these options: the median over repeated runs.

    A run's first step is timed like all others; the one before it, of other optimizers, has warmed the machine up. Gradients
    change from step to step, as the snapshots follow each other in a circle.
    """
    runs: dict[str, list[list[float]]] = {name: [] for name in methods}
    for _ in range(1 + repetitions):
        optimizers = {
            name: optim.NaturalGaLore([{"params": parameters_like(snapshots[0]), "rank": rank, "update_proj_gap": gap}], **options)  # type: ignore[arg-type]
            for name, options in methods.items()
        }
        times: dict[str, list[float]] = {name: [] for name in methods}
        for step in range(gap):
            for name, optimizer in optimizers.items():
                for p, gradient in zip(optimizer.param_groups[0]["params"], snapshots[step % len(snapshots)], strict=True):
                    p.grad = gradient
                times[name].append(seconds(optimizer.step, device))
        for name in methods:
            runs[name].append(times[name])
    return {name: [statistics.median(values) for values in zip(*measured[1:], strict=True)] for name, measured in runs.items()}


def gap_table(times: dict[str, list[float]]) -> Iterator[str]:
    """A row for each run: its steps' distribution in units of the median step."""
    yield "| | median, ms | mean / median | 99 % of steps / median | slowest / median | first / median | steps above 2 x median |"
    yield "|---|---|---|---|---|---|---|"
    for name, values in times.items():
        median, ordered = statistics.median(values), sorted(values)
        parts = [statistics.mean(values), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1], values[0]]
        above = sum(value > 2 * median for value in values)
        yield f"| {name} | {median * 1e3:.1f} | " + "".join(f"{part / median:.2f} | " for part in parts) + f"{above} of {len(values)} |"


# ------------------------------------------------------------------------------------------------------------- command
def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_time", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=("steps", "refresh", "stagger"), help="what is measured (see the top of the file)")
    parser.add_argument("--size", default="60m", help="shapes of conf/model/llama_SIZE.yaml (default 60m)")
    parser.add_argument("--blocks", type=int, help="transformer blocks that are updated (default: steps 1, stagger all of the model's)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the projection (default 128)")
    parser.add_argument("--repetitions", type=int, default=15, help="measurements of each (default 15)")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CONTENDERS), choices=list(CONTENDERS), help="steps: these alone")
    parser.add_argument("--gap", type=int, default=200, help="stagger: updates between two refreshes (default 200)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="steps: of weights and gradients")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--files", nargs="+", metavar="GLOB", default=[], help="refresh, stagger: text in C4's layout, for gradients")
    parser.add_argument("--tokenizer", metavar="PATH", help="refresh, stagger: a SentencePiece .model file, best a small one")
    parser.add_argument("--train-steps", type=int, default=30, help="refresh, stagger: updates before the gradients are taken (default 30)")
    parser.add_argument("--train-blocks", type=int, default=1, help="refresh, stagger: blocks of the model in training (default 1)")
    options = parser.parse_args(argv)
    if options.part != "steps" and not (options.files and options.tokenizer):
        parser.error(f"{options.part} needs --files and --tokenizer, for gradients of a real model")
    return options


def gradients_of_training(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Gradients of a block of this shape in a model of few blocks, at half of the training steps and after the last one."""
    tokenizer = Tokenizer.load(options.tokenizer)
    model = dataclasses.replace(model_of(options.size), num_hidden_layers=options.train_blocks, vocab_size=tokenizer.vocab_size)
    at_steps = [options.train_steps // 2, options.train_steps]
    return real_gradients(model, options.files, tokenizer, at_steps=at_steps, rows=8, device=options.device)


def main(argv: list[str] | None = None) -> None:
    """Measure one part and print its table."""
    options = arguments(argv)
    where = f"{options.size}, rank {options.rank}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    repeated = {"repetitions": options.repetitions, "device": options.device}
    if options.part == "steps":
        shapes = block_shapes(model_of(options.size)) * (options.blocks or 1)
        times, missing = measure_steps(shapes, options.rank, options.only, dtype=getattr(torch, options.dtype), **repeated)
        print(f"{where}, {len(shapes)} matrices, {options.dtype}: steps away from a refresh, n = {options.repetitions}")
        print("\n".join(["", *steps_table(times), "", *missing]))
    elif options.part == "refresh":
        before, after = gradients_of_training(options)
        largest_of_each_shape = {short_side_first(gradient).shape: name for name, gradient in after.items()}
        results = {
            f"{name} {tuple(shape)}": measure_refresh(
                short_side_first(before[name]), short_side_first(after[name]), options.rank, **repeated
            )
            for shape, name in largest_of_each_shape.items()
        }
        print(f"{where}: finding a basis, gradients after {options.train_steps} updates, n = {options.repetitions}")
        print("\n".join(["", *refresh_table(results)]))
    else:
        blocks = options.blocks or model_of(options.size).num_hidden_layers
        snapshots = [list(block.values()) * blocks for block in gradients_of_training(options)]
        methods: dict[str, dict[str, object]] = {
            "staggered, randomized": {"stagger": True, "subspace": "randomized"},
            "all at once, randomized": {"stagger": False, "subspace": "randomized"},
        }
        times = measure_gap(snapshots, options.rank, options.gap, methods, **repeated)
        print(f"{where}: every step of the first gap of {options.gap}, {blocks} blocks, median of {options.repetitions} runs")
        print("\n".join(["", *gap_table(times)]))


if __name__ == "__main__":
    main()
