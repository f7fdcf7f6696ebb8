"""Faults of one of two ranks, and of two at once: who is not broken ends by name or goes on, and nothing is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

SAVES = ["checkpoint.every_steps=2", "checkpoint.keep=9"]
SPIKES = ["trainer.spike_window=8", "trainer.spike_deviations=4", "scheduler.warmup_steps=0", "eval.every_steps=0", "eval.at_end=false"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last_line(rank, words):
    """The last line of what a rank has said that has these words in it."""
    return next((line for line in reversed(rank.said.splitlines()) if words in line), rank.said)


# ----------------------------------------------------------------------------------------------------------------- kill -9
KILLS = ["kill@4", "kill-in-update@2", "kill-in-save@1", "kill-in-evaluation@1", "kill-before-mark@1#0"]


@pytest.fixture(scope="module")
def killed(break_ranks, left, tmp_path_factory):
    """A run that is killed five times, each time in another place of step 4, and started again; and one that nobody stopped."""
    straight, folder = tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("killed")
    assert [rank.code for rank in break_ranks(straight, "", *SAVES)] == [0, 0]
    told = {}
    for kill in KILLS:
        ranks = break_ranks(folder, kill, *SAVES)
        files = sorted(path.name for path in (folder / "tiny/checkpoints").iterdir() if "step-" in path.name)
        told[kill.partition("@")[0]] = SimpleNamespace(ranks=ranks, files=files, good=left(folder).checkpoints())
    return SimpleNamespace(told=told, end=break_ranks(folder, "", *SAVES), straight=left(straight), left=left(folder))


def test_a_rank_killed_in_backward_stops_the_other_by_name(killed, seen):
    """kill -9 of rank 1 in the backward pass of step 4, 2 ranks | rank 0 stops with code 4, names rank and step, once; step 2 stays"""
    first, second = killed.told["kill"].ranks
    assert (first.code, second.code) == (4, -9)
    assert first.said.count("rank 1 died or was stopped: no sign of life") == 1
    assert "rank 0 was in: step 4" in first.said
    assert killed.told["kill"].good == ["step-0000002"]
    seen(f"codes {first.code}, {second.code}; {last_line(first, 'died')}")


def test_a_rank_killed_between_the_updates_of_two_layers_leaves_no_half_applied_step(killed, seen):
    """kill -9 of rank 1 when some layers of step 4 are updated and others are not | code 4; no checkpoint has half a step"""
    first, second = killed.told["kill-in-update"].ranks
    assert (first.code, second.code) == (4, -9)
    assert killed.told["kill-in-update"].good == ["step-0000002"]
    seen(f"codes {first.code}, {second.code}; {last_line(first, 'died')}")


def test_a_rank_killed_while_it_saves_leaves_what_is_not_taken_for_a_checkpoint(killed, seen):
    """kill -9 of rank 1 while it writes its file of step 4 | code 4; a hidden folder is left, and step 2 is the newest checkpoint"""
    told = killed.told["kill-in-save"]
    assert [rank.code for rank in told.ranks] == [4, -9]
    assert told.files == [".step-0000004.tmp", "step-0000002"]
    assert told.good == ["step-0000002"]
    seen(f"left: {', '.join(told.files)}; {last_line(told.ranks[0], 'died')}")


def test_a_rank_killed_in_evaluation_stops_the_other(killed, seen):
    """kill -9 of rank 1 in the evaluation after step 4 | rank 0 stops with code 4 and says where it was"""
    first, second = killed.told["kill-in-evaluation"].ranks
    assert (first.code, second.code) == (4, -9)
    assert "evaluation after step 4" in last_line(first, "died")
    seen(last_line(first, "died"))


def test_rank_0_killed_before_the_mark_leaves_what_is_not_taken_for_a_checkpoint(killed, seen):
    """kill -9 of rank 0 between the rename of step 4 and its mark | rank 1 stops with code 4; step 4 is there, unmarked, and passed over"""
    told = killed.told["kill-before-mark"]
    assert [rank.code for rank in told.ranks] == [-9, 4]
    assert "step-0000004" in told.files
    assert told.good == ["step-0000002"]
    assert "passing over" in killed.end[0].said
    seen(f"{told.ranks[1].said.strip().splitlines()[0]}; {last_line(killed.end[0], 'passing over')}")


def test_a_run_killed_five_times_ends_with_the_bits_of_the_run_that_nobody_stopped(killed, seen):
    """The five kills above in one run, each time started again | weights, losses and steps are those of the run that nobody stopped"""
    assert [rank.code for rank in killed.end] == [0, 0]
    assert [row["step"] for row in killed.left.records()] == list(range(1, 9))
    assert killed.left.losses() == killed.straight.losses()
    assert killed.left.checkpoints() == killed.straight.checkpoints()
    assert same(killed.left.weights(8), killed.straight.weights(8))
    seen(f"steps {[row['step'] for row in killed.left.records()]}, last loss {killed.left.losses()[-1]} and {killed.straight.losses()[-1]}")


# ------------------------------------------------------------------------------------------------ what training survives
@pytest.fixture(scope="module")
def wild(break_ranks, left, tmp_path_factory):
    """One run in which five things go wrong on one rank or the other, and that goes on."""
    folder = tmp_path_factory.mktemp("wild")
    faults = "full-disk@1 nan@3 inf@5#0 stop@6 nan-loss@7"
    ranks = break_ranks(folder, faults, "checkpoint.every_steps=1", "checkpoint.keep=9", "engine.check_replicas_every=1")
    return SimpleNamespace(ranks=ranks, left=left(folder))


@pytest.mark.parametrize(
    ("step", "what"), [(3, "a gradient is NaN on rank 1"), (5, "infinite on rank 0"), (7, "the loss is NaN on rank 1")]
)
def test_a_number_that_is_not_finite_on_one_rank_skips_the_step_on_all(wild, seen, step, what):
    """NaN in one gradient on rank 1, Inf in one on rank 0, NaN in the loss of rank 1 | skipped on both, every bit stays, counted once"""
    assert [rank.code for rank in wild.ranks] == [0, 0]
    assert same(wild.left.weights(step - 1), wild.left.weights(step))
    assert not same(wild.left.weights(step), wild.left.weights(step + 1)), "and the next step is not skipped"
    skipped = [row["optim/skipped_steps"] for row in wild.left.records()]
    assert skipped == [0, 0, 1, 1, 2, 2, 3, 3]
    seen(f"{what}: optim/skipped_steps {skipped[step - 2]} -> {skipped[step - 1]}, weights of steps {step - 1} and {step} bit-equal")


def test_a_full_disk_of_one_rank_costs_one_checkpoint_and_not_the_run(wild, seen):
    """Rank 1 finds no space left at the save of step 1, checkpoint.on_error=warn | no rank publishes it, a warning; the next is written"""
    assert wild.left.checkpoints() == [f"step-{step:07d}" for step in range(2, 9)]
    assert "rank 1: No space left on device; the run goes on" in wild.left.log()
    seen(last_line(wild.ranks[0], "No space left"))


def test_a_rank_that_stands_still_for_a_while_is_waited_for(wild, seen):
    """Rank 1 is stopped (SIGSTOP) for 4 s in step 6 | nobody ends; the step takes that long"""
    seconds = [row["time/step_s"] for row in wild.left.records()]
    assert seconds[5] > 4
    assert wild.left.records()[-1]["step"] == 8
    seen(f"time/step_s {seconds[5]:.1f}, all 8 steps done")


# ----------------------------------------------------------------------------------------------------------------- spikes
def test_a_spike_on_one_rank_sends_all_ranks_back_together(break_ranks, left, tmp_path, seen):
    """A loss 100 times too high on rank 1 in step 6, on_spike=rollback, optimizer.apply=immediate | both go back to step 4, together,
    and on with the batches that follow; their weights stay equal"""
    settings = [*SPIKES, "trainer.on_spike=rollback", "optimizer.apply=immediate", "engine.check_replicas_every=1"]
    ranks = break_ranks(tmp_path, "spike@6", *settings, "checkpoint.every_steps=4")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].said
    records, log = left(tmp_path).records(), left(tmp_path).log()
    assert [row["step"] for row in records] == list(range(1, 9))
    assert (records[-1]["train/rollbacks"], records[-1]["train/loss_spikes"]) == (1, 1)
    assert log.count("back to step-0000004, and on with the batches that follow") == 1
    assert "back to step-0000004" in (tmp_path / "tiny/train.rank-1.log").read_text()
    seen(last_line(ranks[0], "back to").strip())


def test_a_spike_on_one_rank_is_skipped_on_all(break_ranks, left, tmp_path, seen):
    """The same, on_spike=skip | both skip the step, weights bit for bit as before"""
    ranks = break_ranks(tmp_path, "spike@6", *SPIKES, "trainer.on_spike=skip", "checkpoint.every_steps=1", "checkpoint.keep=9")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].said
    assert same(left(tmp_path).weights(5), left(tmp_path).weights(6))
    assert not same(left(tmp_path).weights(6), left(tmp_path).weights(7))
    assert left(tmp_path).records()[-1]["optim/skipped_steps"] == 1
    seen(last_line(ranks[0], "loss spike").strip())


# ------------------------------------------------------------------------------------------------------- errors and hangs
def test_a_rank_that_hangs_is_named_with_its_step_and_all_ranks_write_their_stacks(break_ranks, tmp_path, seen):
    """Rank 1 sleeps for ever in step 3, hang_seconds=20 | code 4 on both, rank, step and line named, stacks of both ranks on disk"""
    first, second = break_ranks(tmp_path, "hang@3", "trainer.hang_seconds=20", "engine.timeout_seconds=60")
    assert (first.code, second.code) == (4, 4)
    assert "rank 1 made no progress for 20 s" in first.said
    assert "rank 1: step 3, busy in" in first.said
    stacks = [(tmp_path / f"tiny/stacks.rank-{rank}.log").read_text() for rank in range(2)]
    assert "broken_ranks.py" in stacks[1]
    assert "collectives.py" in stacks[0]
    seen(f"{last_line(first, 'made no progress')}; {last_line(first, 'rank 1: step 3').strip()}")


def test_an_error_of_one_rank_is_what_all_end_with(break_ranks, tmp_path, seen):
    """An exception in the backward pass of rank 1 in step 3 | rank 0 ends too, with that error's text, not with what gloo says"""
    first, second = break_ranks(tmp_path, "raise@3")
    assert (first.code, second.code) == (1, 1)
    assert "rank 1: no such number" in first.said
    assert "gloo" not in first.said
    assert "ArithmeticError: no such number" in second.said
    seen(last_line(first, "no such number"))


def test_unreadable_data_on_one_rank_saves_on_all_and_ends_all(break_ranks, left, tmp_path, seen):
    """Data of rank 1 cannot be read in step 5 | both save step 4 together and end with code 2, naming rank, file and line"""
    first, second = break_ranks(tmp_path, "data@5")
    assert (first.code, second.code) == (2, 2)
    assert "rank 1: shard-7.jsonl line 12: not JSON" in first.said
    assert left(tmp_path).checkpoints() == ["step-0000004"]
    seen(f"{last_line(first, 'shard-7')}; {left(tmp_path).checkpoints()[0]} is there")


# -------------------------------------------------------------------------------------------------------------- the start
def test_several_ranks_in_a_folder_that_is_in_use_are_refused_by_name(break_ranks, tmp_path, seen):
    """A second run of two ranks started in the folder of a run | both end with code 2, the process is named once; nothing is touched"""
    (tmp_path / "tiny").mkdir()
    holder = "import sys; from pathlib import Path; from ngpt.dist.folder_lock import only_run_in\n"
    holder += "with only_run_in(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "tiny")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout.readline() == "held\n"
        first, second = break_ranks(tmp_path, "")
        assert (first.code, second.code) == (2, 2)
        assert f"process {process.pid} on" in first.said
        assert "Traceback" not in first.said + second.said
        assert not (tmp_path / "tiny/metrics.jsonl").exists()
        assert not (tmp_path / "tiny/checkpoints").exists()
        process.stdin.close()
    seen(last_line(first, "trains in this run folder"))


def test_a_port_that_is_taken_is_named(break_ranks, tmp_path, seen):
    """MASTER_PORT is another program's, which takes connections and says nothing | both ranks say so in time, code 2, no traceback"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = break_ranks(tmp_path, "", "engine.timeout_seconds=5", port=port)
    assert (first.code, second.code) == (2, 2), first.said + second.said
    for rank in (first, second):
        assert f"did not reach the others through 127.0.0.1:{port} in 5 s" in rank.said
        assert "Traceback" not in rank.said
    seen(f"{last_line(first, 'did not reach')}; rank 1: {last_line(second, 'did not reach')}")
