"""Faults of one of two ranks: each test is one fault, its docstring says `fault | expected`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ngpt.dist.collectives import Collectives
from ngpt.dist.replicas import ReplicasDiffer
from ngpt.run import Run, exit_code_of


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_rank_killed_in_backward_stops_the_other_and_the_resumed_run_is_bit_equal(two_ranks, tiny, tmp_path, record_property):
    """kill -9 of rank 1 in backward of step 6, 2 ranks, fp32 | rank 0 stops with code 4 naming rank and step; resumed: same bits"""
    saves = ["checkpoint.every_steps=4", "eval.every_steps=0", "eval.at_end=false"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert [rank.code for rank in two_ranks("", *saves, folder=straight)] == [0, 0]
    first, second = two_ranks("kill@6", *saves, folder=killed)
    assert (first.code, second.code) == (4, -9)
    assert "rank 1 died or was stopped" in first.said
    assert "rank 0 was in: step 6" in first.said
    assert [rank.code for rank in two_ranks("", *saves, folder=killed)] == [0, 0]
    assert same(tiny.weights(8, killed), tiny.weights(8, straight))
    assert [row["train/loss"] for row in tiny.records(killed)] == [row["train/loss"] for row in tiny.records(straight)]
    record_property("seen", "code 4, 'rank 1 died ... step 6'; resumed at step 4, weights and losses bit-equal")


def test_a_rank_that_hangs_is_named_with_its_step_and_all_ranks_write_their_stacks(two_ranks, tiny, record_property):
    """Rank 1 sleeps for ever in step 3, hang_seconds=25 | code 4 on both, rank, step and line named, stacks of both ranks on disk"""
    first, second = two_ranks("hang@3", "trainer.hang_seconds=25", "engine.timeout_seconds=60")
    assert first.code == 4
    assert second.code == 4
    assert "rank 1 made no progress for 25 s" in first.said
    assert "rank 1: step 3, busy in" in first.said
    stacks = [(tiny.folder / f"stacks.rank-{rank}.log").read_text() for rank in range(2)]
    assert "broken_ranks.py" in stacks[1]
    assert "collectives.py" in stacks[0]
    record_property("seen", "rank 1 in step 3 named, rank 0 waiting; both stacks written")


@pytest.mark.slow
def test_a_rank_killed_in_evaluation_stops_the_other_and_the_run_continues(two_ranks, tiny, tmp_path):
    """kill -9 of rank 1 in the evaluation after step 4 | rank 0 stops with code 4; resumed: the bits of the run that nobody stopped"""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert [rank.code for rank in two_ranks("", "checkpoint.every_steps=2", folder=straight)] == [0, 0]
    assert [rank.code for rank in two_ranks("kill-in-evaluation@1", "checkpoint.every_steps=2", folder=killed)] == [4, -9]
    assert [rank.code for rank in two_ranks("", "checkpoint.every_steps=2", folder=killed)] == [0, 0]
    assert same(tiny.weights(8, killed), tiny.weights(8, straight))


@pytest.mark.slow
def test_a_nan_in_one_gradient_on_one_rank_skips_the_step_on_all(two_ranks, tiny):
    """NaN in one gradient on rank 1 in step 3 | the step is skipped on both, weights bit for bit as before, counted once"""
    ranks = two_ranks("nan@3", "checkpoint.every_steps=1", "checkpoint.keep=9")
    assert [rank.code for rank in ranks] == [0, 0]
    assert same(tiny.weights(2), tiny.weights(3))
    assert [row["optim/skipped_steps"] for row in tiny.records()] == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_unreadable_data_on_one_rank_saves_on_all_and_ends_all(two_ranks, tiny):
    """Data of rank 1 cannot be read in step 5 | both save step 4 together and end with code 2, naming rank, file and line"""
    first, second = two_ranks("data@5")
    assert (first.code, second.code) == (2, 2)
    assert "rank 1: shard-7.jsonl line 12: not JSON" in first.said
    assert (tiny.folder / "checkpoints/latest").read_text() == "step-0000004\n"


def compare_ranks(lost_batches: int, tokens_lost: int, flipped: bool, zero_stage: int) -> tuple[str, int]:
    """What `Run.check_replicas` says on this rank, and the exit code, where rank 1 has lost something or has another weight."""
    ranks = Collectives()
    of_rank_1 = ranks.rank == 1
    run = SimpleNamespace(
        config=SimpleNamespace(engine=SimpleNamespace(zero_stage=zero_stage)),
        ranks=SimpleNamespace(world_size=ranks.size),
        collectives=ranks,
        device="cpu",
        progress=SimpleNamespace(step=40, tokens=1000 - tokens_lost * of_rank_1),
        engine=SimpleNamespace(weights=lambda: [("head", torch.ones(3) + flipped * of_rank_1)]),
        _data_state={"global_batches": 40 - lost_batches * of_rank_1, "settings": {}, "streams": {str(ranks.rank): {}}},
    )
    try:
        Run.check_replicas(run)
    except ReplicasDiffer as error:
        return str(error), exit_code_of(error)
    return "equal", 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((1, 0, False, 1), "step 40: the position in the data on rank 1 differs from the other ranks' in the number of batches taken"),
        ((0, 9, False, 3), "step 40: the position in the data on rank 1 differs from the other ranks' in the tokens counted"),
        ((0, 0, True, 2), "step 40: head on rank 1 differs"),
        ((0, 0, True, 3), "equal"),  # each rank's weights are its own there
    ],
)
def test_a_rank_that_lost_a_batch_or_a_bit_is_named_by_the_comparison_of_ranks(on_ranks, record_property, fault, said):
    """Rank 1 of 3 has taken a batch less, or holds another weight | check_replicas_every: all stop with code 4, naming rank 1 and what"""
    results = on_ranks(3, compare_ranks, *fault)
    assert all(text.startswith(said) for text, _ in results)
    assert [code for _, code in results] == [0 if said == "equal" else 4] * 3
    record_property("seen", said)
