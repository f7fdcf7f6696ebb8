"""What all ranks hold is compared: one flipped bit names the rank and the parameter, one batch too many the rank and the place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ngpt.config.schema import SyntheticDataConfig
from ngpt.data.loader import build_train_loader
from ngpt.data.train_loader import position_of
from ngpt.dist.collectives import Collectives
from ngpt.dist.ranks import Ranks
from ngpt.dist.replicas import ReplicasDiffer, bit_hash, check_position, check_replicas
from ngpt.run import Run, exit_code_of


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
    """One bit of one weight flipped on one of three ranks | the check of replicas names rank and parameter on all"""
    assert on_ranks(3, check_with_a_flipped_bit, None) == ["equal"] * 3
    said = on_ranks(3, check_with_a_flipped_bit, 1)
    assert all(text.startswith("step 20: down on rank 1 differs") for text in said)


def check_positions(lost: int | None, streams: int, seed_of_lost: int = 3) -> str:
    """Four ranks after three batches of 8 rows; the rank `lost` has taken four, or has another seed."""
    collectives = Collectives()
    is_lost = collectives.rank == lost
    loader = build_train_loader(
        SyntheticDataConfig(document_tokens=30, shuffle_window=8, streams=streams),
        None,
        vocab_size=64,
        seq_len=16,
        micro_batch_size=2,
        global_batch_size=8,
        seed=seed_of_lost if is_lost else 3,
        ranks=Ranks(collectives.rank, collectives.size, collectives.rank),
    )
    try:
        for _ in range(4 if is_lost and seed_of_lost == 3 else 3):
            next(loader)
        check_position(position_of(loader.state_dict()), collectives, step=3)
    except ReplicasDiffer as error:
        return str(error)
    finally:
        loader.close()
    return "equal"


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_ranks_that_share_streams_agree_on_where_they_are(on_ranks, streams):
    assert on_ranks(4, check_positions, None, streams) == ["equal"] * 4


def test_a_rank_that_has_taken_a_batch_too_many_is_named(on_ranks):
    for lost in (0, 2):
        said = on_ranks(4, check_positions, lost, 4)
        assert all(text.startswith(f"step 3: the position in the data on rank {lost} differs") for text in said)
        assert all("in the number of batches taken" in text for text in said)


def test_a_rank_with_other_data_is_named(on_ranks):
    said = on_ranks(4, check_positions, 1, 4, 5)
    assert all(text.startswith("step 3: the position in the data on rank 1 differs from the other ranks' in the settings") for text in said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_any_changed_element_and_any_exchange_changes_the_hash(dtype):
    """Each element changed, and any two exchanged | the hash differs"""
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
