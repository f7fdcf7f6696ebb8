"""Device, seed and process group of this process: begun together, ended together, and with one message where a rank fails."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.dist.activity import Activity, HangWatch
from ngpt.dist.collectives import Collectives
from ngpt.dist.exit_codes import EXIT_PEER_LOST
from ngpt.dist.ranks import LaunchError, Ranks
from ngpt.dist.watch import PeerLost, Watch, is_collective_failure

_SECONDS_TO_ANSWER = 5  # more than torch was given, whose own error says more


def choose_device(requested: str, ranks: Ranks) -> torch.device:
    """The device that `trainer.device` names. Raises ValueError where it asks for a GPU that is not there."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "trainer.device = cuda: torch sees no NVIDIA GPU here; use trainer.device=auto, "
            "or install a CUDA build of torch and check `nvidia-smi`"
        )
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(
    ranks: Ranks,
    device: torch.device,
    *,
    timeout_seconds: float,
    needed: bool = False,
    exit_code_of: Callable[[BaseException], int] = lambda error: 1,
    activity: Activity | None = None,
    hang_seconds: float = 0,
) -> Iterator[Collectives]:
    """The ranks of this launch as one group, over gloo on CPUs and NCCL on GPUs; no group for a process alone, unless it is `needed`.

    A body that ends on all ranks waits for all of them. One that raises tells the other ranks, which end with its message; one whose
    collective fails raises PeerLost in place of what torch says, and names the rank that died or hangs.

    Args:
        timeout_seconds: how long a collective waits for the slowest rank.
        needed: some part of the run works on process groups only.
        exit_code_of: with what this process is going to exit after an error, for the others to do the same.
        activity: signs of progress of this process.
        hang_seconds: time without one after which all processes write their stacks and end; 0 for never.

    Raises:
        LaunchError: the ranks did not find each other in time.
        PeerLost: another rank failed.
    """
    activity = activity or Activity()
    if ranks.world_size == 1 and not needed:
        with _hang_watch(activity, hang_seconds, None):
            yield Collectives()
        return
    store = _store(ranks, timeout_seconds)
    watch = (
        None
        if ranks.world_size == 1
        else Watch(dist.PrefixStore("watch", store.clone()), ranks, timeout_seconds=timeout_seconds, activity=activity)
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    at_end = False
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        collectives = Collectives()
        collectives.barrier(device)  # or a rank that fails at once would close its connections while others still make them
        with _hang_watch(activity, hang_seconds, watch):
            yield collectives
        if watch is not None:
            collectives.barrier(device)
        at_end = True
    except BaseException as error:
        if watch is not None:
            _end_after(error, watch, exit_code_of)
        raise
    finally:
        if watch is not None:
            watch.close()
        # Early, for the others to notice: this breaks their connections. NCCL would wait for them; there it is the watch that tells them.
        if dist.is_initialized() and (backend == "gloo" or at_end):
            dist.destroy_process_group()


@contextlib.contextmanager
def _hang_watch(activity: Activity, seconds: float, watch: Watch | None) -> Iterator[None]:
    """Look for signs of progress while the body runs; a process alone ends itself where they stop."""

    def end_alone() -> None:
        activity.dump(f"no progress for {seconds:g} s")
        sys.stderr.write(f"\nno progress for {seconds:g} s (trainer.hang_seconds): {activity.where()}\n")
        sys.stderr.flush()
        os._exit(EXIT_PEER_LOST)

    if not seconds:
        yield
        return
    hang_watch = HangWatch(activity, seconds, end_alone if watch is None else lambda: watch.hang(seconds))
    try:
        yield
    finally:
        hang_watch.close()


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Where `wanted`, have torch choose only algorithms that give the same bits every time, and refuse what has none.

    To be entered before anything runs on a GPU: cuBLAS reads its variable when it starts.
    """
    if not wanted:
        yield
        return
    before, workspace = torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _end_after(error: BaseException, watch: Watch, exit_code_of: Callable[[BaseException], int]) -> None:
    """Tell the other ranks of `error`, or raise what they say where it is theirs."""
    if isinstance(error, PeerLost):
        return
    if is_collective_failure(error):
        raise watch.explain(error) from error
    with contextlib.suppress(RuntimeError):  # without a store there is nobody to tell
        watch.report(str(error) or type(error).__name__, exit_code_of(error))


def _store(ranks: Ranks, timeout_seconds: float) -> dist.Store:
    """Where the ranks of this launch, and of this attempt of a launcher that restarts, find each other."""
    if ranks.world_size == 1:
        return dist.HashStore()
    try:
        store = _rendezvous(ranks, timeout_seconds)
    except (dist.DistError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} did not reach the others through {address} in {timeout_seconds:g} s ({error}); "
            "check that all processes were started with the same address, and that rank 0 runs there"
        ) from error
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _rendezvous(ranks: Ranks, timeout_seconds: float) -> dist.Store:
    """The store of this launch. torch heeds no timeout where another program holds the port, takes the connection and says nothing.

    Raises DistError or OSError (TimeoutError among them).
    """
    answers: queue.Queue[dist.Store | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=timedelta(seconds=timeout_seconds)))[0])
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, name="ngpt-rendezvous", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_seconds + _SECONDS_TO_ANSWER)
    except queue.Empty:
        raise TimeoutError("what holds the port does not answer as rank 0 does") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def seed_everything(seed: int) -> None:
    """Seed every global generator that a library below us might draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Tensor]:
    """State of torch's generators and Python's, as tensors.

    Nothing of ours draws from them after the weights are drawn (data order and rounding have seeds of their own); they are
    kept so that a user's own dropout or augmentation resumes exactly too.
    """
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal]),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned; a CUDA state is ignored where there is no GPU."""
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(internal), None if math.isnan(gauss) else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
