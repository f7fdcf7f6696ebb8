"""What the ranks of a run save of the data together is what a single process would save."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ngpt.config.schema import SyntheticDataConfig
from ngpt.data.loader import build_train_loader
from ngpt.data.train_loader import TrainLoader, merge_states
from ngpt.dist.collectives import Collectives
from ngpt.dist.ranks import Ranks

GLOBAL_BATCHES = 3


def trained(rank: int, world_size: int) -> TrainLoader:
    """The loader of one rank after some global batches of 8 rows in micro-batches of 2."""
    loader = build_train_loader(
        SyntheticDataConfig(document_tokens=30, shuffle_window=8, streams=4),
        None,
        vocab_size=64,
        seq_len=16,
        micro_batch_size=2,
        global_batch_size=8,
        seed=3,
        ranks=Ranks(rank, world_size, rank),
    )
    for _ in range(GLOBAL_BATCHES * 4 // world_size):
        next(loader)
    return loader


def merged_state() -> dict[str, Any]:
    collectives = Collectives()
    loader = trained(collectives.rank, collectives.size)
    try:
        states = collectives.gather_bytes(json.dumps(loader.state_dict()).encode())
        return merge_states([json.loads(state) for state in states])
    finally:
        loader.close()


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_the_state_of_a_single_process(on_ranks: Any, ranks: int) -> None:
    alone = merged_state()
    assert alone["global_batches"] == GLOBAL_BATCHES
    assert on_ranks(ranks, merged_state) == [alone] * ranks
