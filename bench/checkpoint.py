"""What saving costs: seconds for which the training loop is blocked, per GB, written at once and in the background, beside torch.save.

    python -m bench.checkpoint --gigabytes 1 --rounds 5 --folder /tmp

Contents are noise of the given size: a third weights, two thirds optimizer state, in tensors of 16 MB. The ways take turns. torch.save is
given the same tensors and forced to disk too, but hashes nothing and removes no older checkpoint. Prints medians with the lowest and
highest, and the ratios to torch.save in the same round, for bench/RECORDS.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ngpt.checkpoint.integrity import problems
from ngpt.checkpoint.store import CheckpointStore
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart

NUMBERS = 4 << 20  # in a tensor, in fp32


class Workload:
    """Tensors and the ways to save them; each returns the seconds for which its caller was blocked, and those until all was on disk."""

    def __init__(self, folder: Path, gigabytes: float) -> None:
        count = max(round(gigabytes * 1e9 / (NUMBERS * 4) / 3), 1)
        self.folder = folder
        self.weights = {f"w{number}": torch.randn(NUMBERS) for number in range(count)}
        shape = torch.Size([NUMBERS])
        moments = {f"w{number}/{key}": torch.randn(NUMBERS) for number in range(count) for key in ("exp_avg", "exp_avg_sq")}
        self.state = {name: StatePart(values, shape, 0, NUMBERS) for name, values in moments.items()}
        self.gigabytes = 3 * count * NUMBERS * 4 / 1e9
        self.step = 0

    def ours(self, *, asynchronous: bool) -> tuple[float, float]:
        """A checkpoint of ours."""
        store = CheckpointStore(self.folder, keep=1, asynchronous=asynchronous, collectives=Collectives())
        self.step += 1
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in self.weights.items()}
        random = {"torch": torch.get_rng_state()}
        started = time.perf_counter()
        store.save(self.step, weights=iter(self.weights.items()), layout=layout, optimizer=self.state, random=random, state={})
        blocked = time.perf_counter() - started
        store.wait()
        return blocked, time.perf_counter() - started

    def of_torch(self) -> tuple[float, float]:
        """One file of torch.save."""
        path = self.folder / "torch.pt"
        started = time.perf_counter()
        with path.open("wb") as file:
            torch.save({"weights": self.weights, "state": {name: part.values for name, part in self.state.items()}}, file)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
        return seconds, seconds

    def verified(self) -> tuple[float, float]:
        """Reading all files of the newest checkpoint and comparing their hashes, as a resume does."""
        started = time.perf_counter()
        found = problems(self.folder / f"step-{self.step:07d}")
        if found:
            raise RuntimeError(found[0])
        seconds = time.perf_counter() - started
        return seconds, seconds


def spread(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: that of temporary files)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        work = Workload(folder, options.gigabytes)
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "ngpt": lambda: work.ours(asynchronous=False),
            "ngpt, asynchronous": lambda: work.ours(asynchronous=True),
            "torch.save": work.of_torch,
            "verify": work.verified,
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                seconds[name].append(way())
        print(f"{work.gigabytes:.2f} GB, {options.rounds} rounds, {torch.get_num_threads()} threads\n")
        print("| way | s blocked per GB | / torch.save | s until on disk per GB |\n|---|---|---|---|")
        for name, measured in seconds.items():
            blocked, whole = ([value / work.gigabytes for value in values] for values in zip(*measured, strict=True))
            ratios = [own / torch_save for (own, _), (torch_save, _) in zip(measured, seconds["torch.save"], strict=True)]
            print(f"| {name} | {spread(blocked)} | {spread(ratios)} | {spread(whole)} |")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
