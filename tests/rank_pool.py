"""A pool of processes in which tests run a function on several ranks at once; torch is imported once in each process.

This file is the pool, and also the program of its processes (`python rank_pool.py FILE_DESCRIPTOR`).
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
COLLECTIVE_SECONDS = 30  # after which gloo gives up on a peer
GRACE_SECONDS = 2  # for the others to end by themselves after one rank has failed
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankFailed(RuntimeError):
    """A rank died or hung, or raised what cannot be sent to another process."""


class RankTraceback(Exception):
    """Where an exception was raised in its rank; shown as its cause."""

    def __str__(self) -> str:
        return str(self.args[0])


class RankPool:
    """Processes that wait for work. They start when they are first needed, and again after one had to be killed."""

    def __init__(self) -> None:
        self._processes: list[_RankProcess] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, store: Path, timeout: float = 120) -> list[Any]:
        """Run `function(*args)` on ranks 0..world_size-1 of a fresh gloo group and return the results by rank.

        Args:
            function: at the top level of a module. It and `args` and the results are pickled; tensors must be on the CPU.
            store: an empty file, or none yet, through which the ranks find each other.
            timeout: seconds for all of it.

        Raises:
            RankFailed: a rank died or hung. Whatever a rank raises is raised here, with that rank's traceback as its cause.
        """
        ended = [process for process in self._processes if process.process.poll() is not None]
        self._discard(ended)
        while len(self._processes) < world_size:
            self._processes.append(_RankProcess())
        ranks = self._processes[:world_size]
        for rank, process in enumerate(ranks):
            process.connection.send_bytes(pickle.dumps((_whereabouts(function), rank, world_size, str(store))))
            process.connection.send_bytes(pickle.dumps(args))
        return self._collect(ranks, time.monotonic() + timeout, timeout)

    def _collect(self, ranks: list[_RankProcess], deadline: float, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[float, BaseException]] = []
        while len(results) < len(ranks):
            waiting = {process.connection: rank for rank, process in enumerate(ranks) if rank not in results}
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                hung = [f"rank {rank} hangs\n{ranks[rank].stack()}" for rank in waiting.values()]
                self._discard([ranks[rank] for rank in waiting.values()])
                raise _first(failures) or RankFailed(f"not done after {timeout:.0f} s: " + "\n".join(hung))
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                results[rank], failed_at, error = self._result(rank, ranks[rank])
                if error is not None:
                    failures.append((failed_at, error))
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failure := _first(failures):
            raise failure
        return [results[rank] for rank in range(len(ranks))]

    def _result(self, rank: int, process: _RankProcess) -> tuple[Any, float, BaseException | None]:
        try:
            result, failed_at, error, trace = pickle.loads(process.connection.recv_bytes())
        except (EOFError, OSError):
            code = process.process.wait()
            end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._discard([process])
            return None, 0.0, RankFailed(f"rank {rank} died ({end})\n{process.errors()}")
        if trace is None:
            return result, 0.0, None
        error = error or RankFailed(trace)
        error.__cause__ = RankTraceback(f"in rank {rank}:\n{trace}")
        return None, failed_at, error

    def _discard(self, processes: list[_RankProcess]) -> None:
        for process in processes:
            process.kill()
        self._processes = [process for process in self._processes if process not in processes]

    def close(self) -> None:
        """End all processes."""
        self._discard(self._processes)


class _RankProcess:
    """One process of the pool, its connection, and a file with what it says on stderr."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process lives
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            env=environment | {"OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
        )
        theirs.close()

    def stack(self) -> str:
        """Where the process is now."""
        self.process.send_signal(signal.SIGUSR2)
        time.sleep(0.5)
        return self.errors()

    def errors(self) -> str:
        """The end of what the process has said."""
        self._errors.seek(0)
        return self._errors.read()[-4000:].decode(errors="replace")

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _first(failures: list[tuple[float, BaseException]]) -> BaseException | None:
    """The failure that came first: it is the cause, and the others only follow from it."""
    return min(failures, key=lambda item: item[0], default=(0.0, None))[1]


def _whereabouts(function: Callable[..., Any]) -> tuple[str, str | None, str]:
    """Module, the file to load it from where it is no importable module, and the name of a function."""
    name, module_file = function.__module__, sys.modules[function.__module__].__file__
    assert module_file is not None
    is_test = Path(module_file).resolve().is_relative_to(Path(__file__).parent)
    return name, module_file if is_test else None, function.__qualname__


# ------------------------------------------------------------------------------------------------- in the processes
def _serve(connection: Connection) -> None:
    """Run one function after the other until the pool closes the connection."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            whereabouts, rank, world_size, store = pickle.loads(connection.recv_bytes())
            arguments = connection.recv_bytes()
            with _group(rank, world_size, store):
                try:
                    function = _load(*whereabouts)  # first: the arguments may be of types that its module defines
                    answer = pickle.dumps((function(*pickle.loads(arguments)), 0.0, None, None))
                except BaseException as error:  # whatever a test raises in a rank belongs into the test
                    answer = _pickled_error(error)
                connection.send_bytes(answer)  # before the group ends: that makes other ranks fail, and the first to fail is the cause


def _load(name: str, module_file: str | None, qualified_name: str) -> Callable[..., Any]:
    if module_file is None:
        module = importlib.import_module(name)
    elif name in sys.modules:
        module = sys.modules[name]
    else:
        spec = importlib.util.spec_from_file_location(name, module_file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found: Any = module
    for part in qualified_name.split("."):
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _group(rank: int, world_size: int, store: str) -> Iterator[None]:
    """A gloo group, and what a launcher would have put into the environment of its ranks."""
    import torch
    import torch.distributed as dist

    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    # Nobody goes to that address, because the group exists already.
    os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    dist.barrier()  # or a rank whose function is done at once would close its connections while others still make them
    try:
        yield
    finally:
        deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
        if deepspeed is not None and deepspeed.cdb is not None:
            deepspeed.destroy_process_group()
            deepspeed.cdb = None  # else it takes the next group for this one
        elif dist.is_initialized():
            dist.destroy_process_group()
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)


def _pickled_error(error: BaseException) -> bytes:
    now, trace = time.monotonic(), traceback.format_exc()  # a clock that all processes share
    try:
        answer = pickle.dumps((None, now, error, trace))
        pickle.loads(answer)  # an exception with arguments of its own is pickled without complaint and cannot be read
    except Exception:
        return pickle.dumps((None, now, None, trace))
    return answer


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    _serve(Connection(int(sys.argv[1])))
