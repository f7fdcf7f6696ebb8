"""Ranks that look after each other: signs of life and failures go through the store, and a rank that is lost ends all others by name."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil
import torch.distributed as dist

from ngpt.dist.activity import WAITING, Activity
from ngpt.dist.exit_codes import EXIT_PEER_LOST
from ngpt.dist.ranks import Ranks

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_GRACE_SECONDS = 5.0  # in which a rank whose peer has failed may end by itself


class PeerLost(RuntimeError):
    """Another rank died, hangs or has failed; the text names it.

    `speaks` says whether this rank is the one to tell, and `exit_code` with what to exit: that of the rank that failed, or 4.
    """

    def __init__(self, text: str, *, speaks: bool, exit_code: int = EXIT_PEER_LOST) -> None:
        super().__init__(text)
        self.speaks = speaks
        self.exit_code = exit_code


class Watch:
    """A thread that gives a sign of life every second and ends this process where another one's failure has left it waiting.

    Rank 0 looks after all others and rank 1 after rank 0; the first failure that anybody sees goes to the store, where all look for it.
    A rank that has had a collective fail asks `explain` why. Where the launcher dies, a rank gets the SIGTERM that it would have sent.

    Args:
        store: of the process group; used from another thread, so give a connection of its own.
        timeout_seconds: silence after which a rank counts as lost.
        activity: what this process is doing, for the others to say when it is lost, and for its stacks to be written when one hangs.
        end_process: what ends this process when its main thread cannot.
    """

    def __init__(
        self,
        store: dist.Store,
        ranks: Ranks,
        *,
        timeout_seconds: float,
        activity: Activity | None = None,
        beat_seconds: float = _BEAT_SECONDS,
        grace_seconds: float = _GRACE_SECONDS,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._store = store
        self._ranks = ranks
        self._timeout = timeout_seconds
        self._activity = activity or Activity()
        self._wrote_stacks = False
        self._beat_seconds = beat_seconds
        self._grace = grace_seconds
        self._end_process = end_process
        self._beats = 0
        self._watched = range(1, ranks.world_size) if ranks.is_main else range(1) if ranks.rank == 1 else range(0)
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._launcher = _launcher()
        self._stop = threading.Event()
        self._beat()  # so that a rank that never comes this far is not confused with one that fell silent
        self._thread = threading.Thread(target=self._run, name="ngpt-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the others must be about to end too."""
        self._stop.set()
        self._thread.join(timeout=2 * self._beat_seconds)

    def report(self, text: str, exit_code: int) -> None:
        """Tell all ranks that this one has failed, unless another one was first."""
        self._report(f"rank {self._ranks.rank}: {text}", exit_code, [self._ranks.rank])

    def explain(self, error: BaseException) -> PeerLost:
        """Why a collective failed here: what was reported, or else which ranks give no sign of life, or never came to it."""
        try:
            self._store.set(f"stuck/{self._ranks.rank}", b"1")
            before = self._beats_of_all()
            deadline = time.monotonic() + self._grace
            while (failure := self._failure()) is None and time.monotonic() < deadline:
                time.sleep(self._beat_seconds / 4)
            if failure is not None:
                return failure
            silent = [rank for rank, beat in enumerate(self._beats_of_all()) if beat == before[rank]]
            late = [rank for rank in range(self._ranks.world_size) if not self._store.check([f"stuck/{rank}"])]
        except RuntimeError:  # of the store
            text = "the store of the process group is gone: rank 0, the launcher or the first machine has died"
            return PeerLost(f"{text}\n  {_first_line(error)}", speaks=self._ranks.rank <= 1)
        if silent:
            self._report(f"{_names(silent)} died or was stopped: no sign of life{self._last_words(silent)}", EXIT_PEER_LOST, silent)
        elif late:
            text = f"{_names(late)} did not come to a collective within {self._timeout:g} s"
            self._report(text + _lines(self._places_of_all(text)), EXIT_PEER_LOST, late)
        else:
            self._report(f"a collective failed on all ranks: {_first_line(error)}", EXIT_PEER_LOST, [])
        return self._failure() or PeerLost(str(error), speaks=True)

    def hang(self, seconds: float) -> None:
        """Have all ranks write their stacks, and end them with a message that says where each is; who waits for others is not to blame."""
        with contextlib.suppress(RuntimeError):  # of the store, with which the other ranks have ended
            places = self._places_of_all(f"no progress for {seconds:g} s")
            busy = [rank for rank, place in places.items() if WAITING not in place]
            lost = busy if len(busy) < len(places) else []
            text = f"{_names(lost or list(places))} made no progress for {seconds:g} s (trainer.hang_seconds)"
            self._report(text + _lines(places), EXIT_PEER_LOST, lost)

    # ------------------------------------------------------------------------------------------------------ the thread
    def _run(self) -> None:
        failed_at: float | None = None
        while not self._stop.wait(self._beat_seconds):
            if (launcher := _launcher()) != self._launcher:
                self._launcher = launcher
                logger.warning("rank %d: the launcher has died", self._ranks.rank)
                signal.raise_signal(signal.SIGTERM)
            try:
                self._beat()
                self._write_stacks_if_asked()
                self._look_after_others()
                failure = self._failure()
            except RuntimeError:
                self._wait_without_store()
                return
            if failure is None:
                continue
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at > 2 * self._grace:
                if failure.speaks:
                    sys.stderr.write(f"\n{failure}\n")
                    sys.stderr.flush()
                self._end_process(failure.exit_code)
                return

    def _wait_without_store(self) -> None:
        """The store is gone, and rank 0 with it: collectives fail by themselves, and a main thread that is in none is ended."""
        seconds = 2 * self._grace if self._wrote_stacks else self._timeout
        if not self._stop.wait(seconds):
            sys.stderr.write(f"\nrank {self._ranks.rank}: rank 0 has ended and this process goes on: {self._activity.where()}\n")
            sys.stderr.flush()
            self._end_process(EXIT_PEER_LOST)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._ranks.rank}", f"{self._beats} {self._activity.text}")

    def _write_stacks_if_asked(self) -> None:
        if not self._wrote_stacks and self._store.check(["stacks"]):
            self._wrote_stacks = True
            self._store.set(f"place/{self._ranks.rank}", self._activity.where())
            self._activity.dump(self._store.get("stacks").decode())

    def _look_after_others(self) -> None:
        now, lost = time.monotonic(), []
        for rank in self._watched:
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != self._seen.get(rank, (None,))[0]:
                self._seen[rank] = beat, now
            elif now - self._seen[rank][1] > self._timeout:
                lost.append(rank)
        if lost:
            text = f"{_names(lost)} died or was stopped: no sign of life for {self._timeout:g} s{self._last_words(lost)}"
            self._report(text, EXIT_PEER_LOST, lost)

    # ------------------------------------------------------------------------------------------------------- the store
    def _beats_of_all(self) -> list[bytes]:
        keys = [f"beat/{rank}" for rank in range(self._ranks.world_size)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]

    def _last_words(self, lost: Sequence[int]) -> str:
        beats = self._beats_of_all()
        words = {rank: beats[rank].decode().partition(" ")[2] for rank in lost}
        seen = "".join(f"; rank {rank} was last seen in: {text}" for rank, text in words.items() if text)
        return f"{seen}; rank {self._ranks.rank} was in: {self._activity.text}"  # a sign of life is a second old, this is not

    def _places_of_all(self, why: str) -> dict[int, str]:
        """Ask all ranks for their stacks; where each is, of those that answer in time."""
        self._store.compare_set("stacks", "", why)
        ranks, deadline = range(self._ranks.world_size), time.monotonic() + self._grace
        while not self._store.check([f"place/{rank}" for rank in ranks]) and time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 4)
        return {rank: self._store.get(f"place/{rank}").decode() for rank in ranks if self._store.check([f"place/{rank}"])}

    def _report(self, text: str, exit_code: int, lost: Sequence[int]) -> None:
        speaker = min(set(range(self._ranks.world_size)) - set(lost), default=0)
        self._store.compare_set("failure", "", f"{speaker} {exit_code} {text}")

    def _failure(self) -> PeerLost | None:
        if not self._store.check(["failure"]):
            return None
        speaker, exit_code, text = self._store.get("failure").decode().split(" ", 2)
        return PeerLost(text, speaks=int(speaker) == self._ranks.rank, exit_code=int(exit_code))


def _launcher() -> tuple[int, ...]:
    """Processes whose end is the launch's: the parent, and of DeepSpeed's, which outlives the command that a user stops, the parent too."""
    parent = os.getppid()
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(parent)
        if "deepspeed.launcher.launch" in process.cmdline():
            return parent, process.ppid()
    return (parent,)


def is_collective_failure(error: BaseException) -> bool:
    """Whether `error` says that a collective failed, which as a rule is another rank's fault."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _lines(places: Mapping[int, str]) -> str:
    return "".join(f"\n  rank {rank}: {place}" for rank, place in places.items())


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
