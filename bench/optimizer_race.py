"""Train one model, on the same tokens in the same order, with every method and seed, each at the best rate of its own sweep.

    python -m bench.optimizer_race --files 'corpus/*.json.gz' --out DIR [--methods adamw,galore] [--seeds 0,1,2] [--report]

The first seed sweeps the learning rate of the matrices: three rates around a centre, and one more beyond an edge, at most twice each way,
for as long as the best one is at the edge. The best rate then runs the further seeds. Every finished run is one file in DIR/runs and is
never repeated; the race can be killed at any time, and started again with more methods. A method that cannot be built is reported and
left out. At the end, and with --report at once, report.md and plots are written to DIR.

Protocol: warm-up 10 %, cosine to 10 % of the peak, no weight decay, no clipping; embedding, head and norms get AdamW at --rest-rate
whatever the method; bases are refreshed every 100 steps (five times in runs of under 500). Held out is the text of the last file, which
nobody trains on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from bench.race_methods import METHODS
from bench.race_report import final_loss, write_report
from bench.race_training import UNAVAILABLE, Settings, prepare
from ngpt.data.json_lines import expand_globs

RATIO = 1.6  # of neighbouring rates in a sweep
EXTENSIONS = 2  # each way
Run = tuple[str, float, int]  # method, rate, seed
LossOf = Callable[[str, float, int], float | None]


# ---------------------------------------------------------------------------------------------------------------- plan
def sweep_rates(centre: float, loss_of: Callable[[float], float | None], points: int = 3) -> tuple[list[float], float | None]:
    """The rates of a sweep as far as it is known which ones are needed, and the best of them once all are done."""
    low, high = -(points // 2), points // 2
    lowest, highest = (low - EXTENSIONS, high + EXTENSIONS) if points > 1 else (low, high)
    while True:
        rates = [float(f"{centre * RATIO**i:.3g}") for i in range(low, high + 1)]
        losses = [loss for loss in map(loss_of, rates) if loss is not None]
        if len(losses) < len(rates):
            return rates, None
        best = low + losses.index(min(losses))
        if best == low and low > lowest:
            low -= 1
        elif best == high and high < highest:
            high += 1
        else:
            return rates, rates[best - low]


def next_run(centres: dict[str, float], seeds: Sequence[int], loss_of: LossOf, taken: set[Run], points: int = 3) -> Run | None:
    """What to start now: the sweeps of all methods, in order, before any further seed. None if there is nothing, or nothing yet."""
    sweeps = {name: sweep_rates(centre, lambda rate, name=name: loss_of(name, rate, seeds[0]), points) for name, centre in centres.items()}
    wanted = [(name, rate, seeds[0]) for name, (rates, _) in sweeps.items() for rate in rates]
    wanted += [(name, best, seed) for name, (_, best) in sweeps.items() if best is not None for seed in seeds[1:]]
    return next((run for run in wanted if run not in taken and loss_of(*run) is None), None)


# ------------------------------------------------------------------------------------------------------------- workers
class Race:
    """Runs in worker processes, at most `workers` at a time, and the results that are there."""

    def __init__(self, folder: Path, settings_of: Callable[[str, float, int], Settings], workers: int) -> None:
        self._folder, self._settings_of, self._workers = folder, settings_of, workers
        self._losses: dict[Run, float] = {}
        self._busy: dict[Run, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def loss_of(self, name: str, rate: float, seed: int) -> float | None:
        run = (name, rate, seed)
        path = self._settings_of(*run).path(self._folder)
        if run not in self._losses and path.exists():
            self._losses[run] = final_loss(json.loads(path.read_text()))
        return self._losses.get(run)

    def run(self, centres: dict[str, float], seeds: Sequence[int], points: int) -> None:
        """Until nothing is left to do. A method of which a run fails is left out from then on."""
        centres = dict(centres)
        try:
            while True:
                self._collect(centres)
                while len(self._busy) < self._workers and (run := next_run(centres, seeds, self.loss_of, set(self._busy), points)):
                    self._start(run)
                if not self._busy:
                    return
                time.sleep(0.1)
        finally:
            for process, log, _ in self._busy.values():
                process.kill()
                process.wait()
                log.close()

    def _start(self, run: Run) -> None:
        settings = self._settings_of(*run)
        log = open(settings.path(self._folder).with_suffix(".log"), "wb")  # noqa: SIM115 (closed when the process has ended)
        command = [sys.executable, "-m", "bench.race_training", str(self._folder), json.dumps(asdict(settings))]
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._busy[run] = process, log, time.monotonic()

    def _collect(self, centres: dict[str, float]) -> None:
        for run, (process, log, began) in list(self._busy.items()):
            if process.poll() is None:
                continue
            del self._busy[run]
            log.close()
            name, rate, seed = run
            loss, path = self.loss_of(*run), self._settings_of(*run).path(self._folder).with_suffix(".log")
            if loss is not None:
                print(f"{name}, rate {rate:g}, seed {seed}: {loss:.4f} ({time.monotonic() - began:.0f} s)", flush=True)
                path.unlink()
            elif centres.pop(name, None):
                last_line = (path.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                what = "is not available" if process.returncode == UNAVAILABLE else f"failed (status {process.returncode}, see {path})"
                print(f"{name} {what}: {last_line}", flush=True)


# ------------------------------------------------------------------------------------------------------------- command
def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.optimizer_race", description="Race optimizers on one model and one text.")
    parser.add_argument("--files", nargs="+", required=True, metavar="GLOB", help="text in C4's layout; the last file is held out")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="tokens, one file per finished run, report")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, in the order in which they start (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; the first one sweeps (default 0,1,2)")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of an update (default 1024)")
    parser.add_argument("--steps", type=int, default=600, help="updates of a run (default 600)")
    parser.add_argument("--rest-rate", type=float, default=0.01, help="AdamW's rate for embedding, head and norms (default 0.01)")
    parser.add_argument("--sweep-points", type=int, default=3, choices=(1, 3, 5), help="rates to begin with; 1: the centre alone")
    parser.add_argument("--model", default="llama_9m", help="shape, a preset of conf/model (default llama_9m)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the tokenizer trained on the files (default 2048)")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--held-out-tokens", type=int, default=100_352, help="a multiple of 1024 compiles once (default 100352)")
    parser.add_argument("--products", default="bf16", choices=("bf16", "fp32"), help="type of the matrix products (default bf16)")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="compile the blocks: needs a C++ compiler, saves a quarter")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of what is there")
    arguments = parser.parse_args(argv)
    arguments.methods = arguments.methods.split(",")
    if unknown := [name for name in arguments.methods if name not in METHODS]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if arguments.batch_tokens % arguments.seq_len:
        parser.error(f"--batch-tokens {arguments.batch_tokens} is not a multiple of --seq-len {arguments.seq_len}")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _arguments(argv)
    if not arguments.report:
        data = prepare(arguments.out, expand_globs(arguments.files, option="--files"), arguments.vocab_size, arguments.held_out_tokens)
        keys = ("batch_tokens", "steps", "rest_rate", "model", "vocab_size", "seq_len", "products", "compiled")
        common = {key: getattr(arguments, key) for key in keys}
        centres = {name: METHODS[name].rate for name in arguments.methods}

        def settings_of(name: str, rate: float, seed: int) -> Settings:
            return Settings(name=name, method=METHODS[name].to_json(), rate=rate, seed=seed, data=data, **common)

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended as well
        Race(arguments.out, settings_of, arguments.workers).run(centres, arguments.seeds, arguments.sweep_points)
    print(write_report(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
