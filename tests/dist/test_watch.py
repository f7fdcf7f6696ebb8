"""Ranks that look after each other: who is lost is named, one rank speaks, and a rank that waits for ever is ended."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch.distributed as dist

from ngpt.dist.ranks import Ranks
from ngpt.dist.watch import PeerLost, Watch, is_collective_failure

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


@pytest.fixture
def begin():
    """Begin the watch of a rank, with short waits; `ended` gets the code with which it would have ended its process."""
    store, watches = dist.HashStore(), []

    def start(rank: int, world_size: int, *, ended: list[int] | None = None, timeout: float = 60) -> Watch:
        end = ([] if ended is None else ended).append
        ranks = Ranks(rank, world_size, rank)
        watch = Watch(store, ranks, timeout_seconds=timeout, beat_seconds=0.05, grace_seconds=0.4, end_process=end)
        watches.append(watch)
        return watch

    yield start
    for watch in watches:
        watch.close()


def test_a_rank_without_a_sign_of_life_is_named_and_the_lowest_of_the_others_speaks(begin):
    """One of three ranks falls silent in a collective | named; the lowest of the others says it, once; code 4"""
    first, second, lost = (begin(rank, 3) for rank in range(3))
    lost.close()
    with pytest.raises(PeerLost, match="rank 2 died or was stopped: no sign of life") as caught:
        raise first.explain(GLOO)
    assert caught.value.speaks
    assert caught.value.exit_code == 4
    others = second.explain(GLOO)
    assert str(others) == str(caught.value)
    assert not others.speaks


def test_where_rank_0_is_lost_rank_1_speaks(begin):
    """Rank 0 falls silent | rank 1 says so"""
    lost, second = begin(0, 2), begin(1, 2)
    lost.close()
    found = second.explain(GLOO)
    assert "rank 0 died" in str(found)
    assert found.speaks


def test_a_rank_that_lives_and_does_not_come_is_late(begin):
    """A rank lives and does not come to a collective | said to be late, not dead"""
    first, _ = begin(0, 2), begin(1, 2)
    assert "rank 1 did not come to a collective within 60 s" in str(first.explain(GLOO))


def test_what_one_rank_reports_is_what_the_others_say_with_its_exit_code(begin):
    """One rank fails with an error of its own | the others end with its words and its exit code"""
    first, second = begin(0, 2), begin(1, 2)
    second.report("data/x.jsonl line 3: not JSON", 2)
    found = first.explain(GLOO)
    assert str(found) == "rank 1: data/x.jsonl line 3: not JSON"
    assert (found.speaks, found.exit_code) == (True, 2)


def test_a_main_thread_that_waits_for_ever_is_ended_with_the_message(begin, capfd):
    """A main thread waits for ever for a rank that failed | the process is ended, with the message"""
    ended: list[int] = []
    watch, second = begin(0, 2, ended=ended), begin(1, 2, ended=[])
    second.report("on purpose", 2)
    watch._thread.join(timeout=5)
    assert ended == [2]
    assert capfd.readouterr().err == "\nrank 1: on purpose\n"


def test_silence_beyond_the_timeout_ends_ranks_that_are_in_no_collective(begin):
    """A rank is silent while the others are in no collective | they end all the same"""
    ended: list[int] = []
    watch, lost = begin(0, 2, ended=ended, timeout=0.5), begin(1, 2)
    lost.close()
    watch._thread.join(timeout=5)
    assert ended == [4]


def test_ranks_whose_launcher_has_died_stop_as_if_told_to(begin, monkeypatch, seen):
    """kill -9 of the launcher, which leaves its ranks behind | each gets the SIGTERM that the launcher would have sent, and so saves"""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        begin(0, 2)
        monkeypatch.setattr("ngpt.dist.watch._launcher", lambda: (1,))
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]
    seen(f"{signal.Signals(told[0]).name} to this rank")


def test_no_thread_is_left_behind(begin):
    begin(0, 2).close()
    assert "ngpt-watch" not in [thread.name for thread in threading.enumerate()]


def test_failures_of_collectives_are_told_from_other_errors():
    assert is_collective_failure(GLOO)
    assert is_collective_failure(dist.DistNetworkError("closed"))
    assert not is_collective_failure(RuntimeError("shape mismatch"))
    assert not is_collective_failure(ValueError("gloo"))
