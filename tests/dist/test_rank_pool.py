"""The pool in which tests run ranks: results by rank, errors with their place, and life after a rank that died or hung."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist


@dataclass
class Part:
    values: torch.Tensor


class TwoArguments(ValueError):
    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left} {right}")


def summed(part: Part) -> tuple[int, torch.Tensor]:
    dist.all_reduce(part.values)
    return int(os.environ["RANK"]), part.values


def group_size() -> int:
    return dist.get_world_size()


def process_id() -> int:
    return os.getpid()


def fail_on_rank_1(error: str) -> None:
    if dist.get_rank() == 1:
        raise TwoArguments("cannot be", "rebuilt") if error == "foreign" else ValueError("on purpose")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_a_function_runs_on_every_rank_and_its_results_come_back_in_order(on_ranks):
    results = on_ranks(2, summed, Part(torch.arange(3.0)))
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(values, 2 * torch.arange(3.0)) for _, values in results)


def test_processes_are_used_again_by_groups_of_any_size(on_ranks):
    first = on_ranks(2, process_id)
    assert on_ranks(1, group_size) == [1]
    assert on_ranks(3, group_size) == [3, 3, 3]
    assert on_ranks(2, process_id) == first


def test_what_one_rank_raises_is_raised_in_the_test_and_names_the_rank(on_ranks):
    with pytest.raises(ValueError, match="on purpose") as caught:
        on_ranks(2, fail_on_rank_1, "plain")
    assert "in rank 1" in str(caught.value.__cause__)
    assert "fail_on_rank_1" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="cannot be rebuilt"):
        on_ranks(2, fail_on_rank_1, "foreign")
    assert on_ranks(2, group_size) == [2, 2]


def test_a_rank_that_dies_is_named_and_the_pool_lives_on(on_ranks):
    with pytest.raises(RuntimeError, match="rank 1 died"):
        on_ranks(2, die_on_rank_1)
    assert on_ranks(2, group_size) == [2, 2]


def test_a_rank_that_hangs_is_named_with_its_stack_and_the_pool_lives_on(on_ranks):
    on_ranks(2, group_size)
    with pytest.raises(RuntimeError, match=r"rank 0 hangs[\s\S]*hang_on_rank_0"):
        on_ranks(2, hang_on_rank_0, timeout=0.5)
    assert on_ranks(2, group_size) == [2, 2]
