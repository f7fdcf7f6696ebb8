"""The processes of one start of bench/soak.py: begun as ranks or under torchrun, looked at, killed, waited for."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from bench.soak_rank import LONGEST_ACTIVITY

REPOSITORY = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05


class Launch:
    """The processes of one start."""

    def __init__(self, options: argparse.Namespace, settings: list[str], records: Path, number: int) -> None:
        self.ranks, self.number, self._records = options.ranks, number, records
        records.mkdir(parents=True, exist_ok=True)
        self._torchrun = options.launcher == "torchrun"
        temporary = records.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"SOAK_RECORDS": str(records), "SOAK_START": f"{number:04d}", "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        self._log = (records / f"said-{number:04d}.txt").open("wb")
        program = ["-m", "bench.soak_rank", *settings]
        if self._torchrun:
            commands = [[sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}", *program]]
            environments = [environment]
        else:
            commands = [[sys.executable, *program]] * self.ranks
            environments = [environment]
            if self.ranks > 1:
                shared = environment | {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
                environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.ranks)]
        self.processes = [
            subprocess.Popen(command, env=own, cwd=REPOSITORY, stdout=self._log, stderr=subprocess.STDOUT)
            for command, own in zip(commands, environments, strict=True)
        ]

    def activity(self, rank: int) -> tuple[int | None, str]:
        """Process and activity of a rank of this start; no process where it has not said anything yet."""
        with contextlib.suppress(OSError, ValueError):
            number, process, text = (self._records / f"activity.rank-{rank}").read_bytes()[:LONGEST_ACTIVITY].decode().split(" ", 2)
            if int(number) == self.number:
                return int(process), text.strip()
        return None, "starting"

    def process_of(self, rank: int) -> int | None:
        """Process number of a rank, if it is known."""
        return self.activity(rank)[0] if self._torchrun else self.processes[rank].pid

    @property
    def has_steps(self) -> bool:
        """Whether all ranks have taken a step of this start."""
        paths = [self._records / f"start-{self.number:04d}.rank-{rank}.jsonl" for rank in range(self.ranks)]
        return all(path.exists() and path.stat().st_size > 200 for path in paths)

    @property
    def ended(self) -> bool:
        """Whether nothing of it lives."""
        return all(process.poll() is not None for process in self.processes) and not any(
            _lives(process) for rank in range(self.ranks) if self._torchrun and (process := self.process_of(rank))
        )

    def interrupt(self, action: str, generator: random.Random) -> str:
        """Kill (-9) or stop (SIGTERM) one rank, all of them, or their launcher. Returns what was done."""
        what, _, whom = action.partition(" ")
        number = signal.SIGKILL if what == "kill" else signal.SIGTERM
        if whom == "one":
            rank = generator.randrange(self.ranks)
            while (target := self.process_of(rank)) is None and not self.ended:  # torchrun has not started it yet
                time.sleep(POLL_SECONDS)
            targets, whom = [target], f"rank {rank}"
        elif self._torchrun:
            targets, whom = [self.processes[0].pid], "the launcher"
        else:
            targets, whom = [self.process_of(rank) for rank in range(self.ranks)], "all ranks"
        for target in targets:
            if target:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, number)
        return f"{'kill -9' if what == 'kill' else 'SIGTERM'} of {whom}"

    def wait(self, seconds: float | None) -> tuple[int, ...]:
        """What the processes exit with. Raises TimeoutError if one does not end in time; then all are killed."""
        began = time.monotonic()
        while not self.ended:
            if seconds is not None and time.monotonic() - began > seconds:
                self.kill()
                raise TimeoutError(f"start {self.number} did not end within {seconds} s; see {self._log.name}")
            time.sleep(POLL_SECONDS)
        self._log.close()
        return tuple(process.returncode for process in self.processes)

    def kill(self) -> None:
        """End all processes of this start."""
        numbers = [self.process_of(rank) for rank in range(self.ranks)] + [process.pid for process in self.processes]
        for number in numbers:
            if number and _lives(number):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self._log.close()


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
