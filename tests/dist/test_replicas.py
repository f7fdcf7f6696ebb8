"""Replicated weights are compared bit by bit: one flipped bit names the rank and the parameter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ngpt.dist.collectives import Collectives
from ngpt.dist.replicas import ReplicasDiffer, bit_hash, check_replicas


def check_with_a_flipped_bit(on_rank: int | None) -> str:
    generator = torch.Generator().manual_seed(0)
    weights = [(name, torch.randn(5, 7, generator=generator).to(torch.bfloat16)) for name in ("up", "down", "head")]
    if dist.get_rank() == on_rank:
        weights[1][1].view(torch.int16)[2, 3] ^= 1 << 14
    try:
        check_replicas(weights, Collectives(), step=20)
    except ReplicasDiffer as error:
        return str(error)
    return "equal"


def test_equal_weights_pass_and_a_flipped_bit_names_rank_and_parameter(on_ranks):
    assert on_ranks(3, check_with_a_flipped_bit, None) == ["equal"] * 3
    said = on_ranks(3, check_with_a_flipped_bit, 1)
    assert all(text.startswith("step 20: down on rank 1 differs") for text in said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_any_changed_element_and_any_exchange_changes_the_hash(dtype):
    tensor = torch.arange(1, 101).to(dtype)
    for place in (0, 50, 99):
        changed = tensor.clone()
        changed[place] += 1
        assert bit_hash(changed) != bit_hash(tensor)
    assert bit_hash(tensor.flip(0)) != bit_hash(tensor)
    assert bit_hash(tensor.view(10, 10)) == bit_hash(tensor)


def test_large_tensors_are_hashed_in_pieces_with_the_same_result(monkeypatch):
    tensor = torch.randn(1000)
    whole = bit_hash(tensor)
    monkeypatch.setattr("ngpt.dist.replicas._CHUNK", 64)
    assert bit_hash(tensor) == whole
