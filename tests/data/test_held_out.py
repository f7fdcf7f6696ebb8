"""The evaluation set: fixed, disjoint from training, no larger than asked for, the same over any number of ranks."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.schema import DataConfig, LocalC4DataConfig, SyntheticDataConfig
from ngpt.data.documents import DataError
from ngpt.data.loader import Batch, build_eval_batches
from ngpt.data.packing import IGNORED
from ngpt.data.tokenizer import Tokenizer
from ngpt.data.unigram import unigram_perplexity
from ngpt.dist.ranks import Ranks


def held_out(data: DataConfig, tokenizer: Tokenizer, *, rank: int = 0, world_size: int = 1, **sizes: Any) -> list[Batch]:
    options = {"vocab_size": 300, "seq_len": 16, "micro_batch_size": 4, "max_tokens": 10**6, "seed": 0} | sizes
    return build_eval_batches(data, tokenizer, ranks=Ranks(rank, world_size, rank), **options)


def labelled_tokens(batches: list[Batch]) -> list[int]:
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    return labels[labels != IGNORED].tolist()


def texts(corpus: Path, *, held_out: bool) -> list[str]:
    found = []
    for file in sorted(corpus.glob("*.json.gz")):
        with gzip.open(file, "rt") as lines:
            found += [json.loads(line)["text"] for number, line in enumerate(lines, 1) if (number % 10 == 0) == held_out]
    return found


@pytest.fixture
def data(corpus: Path) -> LocalC4DataConfig:
    return LocalC4DataConfig(train_files=[str(corpus / "*.json.gz")], holdout_every=10)


def test_every_held_out_token_is_a_label_once(data: LocalC4DataConfig, corpus: Path, tokenizer: Tokenizer) -> None:
    stream = [token for ids in tokenizer.encode(texts(corpus, held_out=True)) for token in [*ids, tokenizer.eos_id]]
    batches = held_out(data, tokenizer)
    assert labelled_tokens(batches) == stream[1:]
    assert sum(batch.num_label_tokens for batch in batches) == len(stream) - 1


def test_files_of_their_own_are_used_completely(corpus: Path, tokenizer: Tokenizer) -> None:
    data = LocalC4DataConfig(train_files=[str(corpus / "part-[1-4].json.gz")], val_files=[str(corpus / "part-0.json.gz")])
    with gzip.open(corpus / "part-0.json.gz", "rt") as lines:
        encoded = tokenizer.encode([json.loads(line)["text"] for line in lines])
    assert len(labelled_tokens(held_out(data, tokenizer))) == sum(len(ids) + 1 for ids in encoded) - 1


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("max_tokens", [1, 15, 16, 17, 100, 257])
def test_no_more_labels_than_asked_for(data: LocalC4DataConfig, tokenizer: Tokenizer, packing: str, max_tokens: int) -> None:
    data.packing = packing
    everything = labelled_tokens(held_out(data, tokenizer))
    batches = held_out(data, tokenizer, max_tokens=max_tokens)
    assert labelled_tokens(batches) == everything[:max_tokens]
    assert sum(batch.num_label_tokens for batch in batches) == max_tokens
    assert (batches[-1].labels != IGNORED).any()


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_same_tokens_in_batches_of_the_same_shapes(
    data: LocalC4DataConfig, tokenizer: Tokenizer, packing: str, world_size: int
) -> None:
    data.packing = packing
    ranks = [held_out(data, tokenizer, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert labelled_tokens([batch for batches in ranks for batch in batches]) == labelled_tokens(held_out(data, tokenizer))
    assert len({tuple(batch.input_ids.shape for batch in batches) for batches in ranks}) == 1


def test_the_set_is_the_same_every_time_and_for_every_seed(data: LocalC4DataConfig, tokenizer: Tokenizer) -> None:
    assert labelled_tokens(held_out(data, tokenizer, seed=1)) == labelled_tokens(held_out(data, tokenizer, seed=2))


def test_masked_documents_reach_the_evaluation(data: LocalC4DataConfig, tokenizer: Tokenizer) -> None:
    data.mask_documents = True
    batch = held_out(data, tokenizer, seq_len=64)[0]
    assert batch.document_ids is not None
    assert set(batch.model_inputs()) == {"input_ids", "labels", "document_ids"}
    closes = batch.input_ids[0] == tokenizer.eos_id
    assert batch.document_ids[0].tolist() == (closes.cumsum(0) - closes.long()).tolist()


def test_synthetic_text_holds_out_a_stream_of_its_own(tokenizer: Tokenizer) -> None:
    batches = held_out(SyntheticDataConfig(), tokenizer, max_tokens=1000)
    assert sum(batch.num_label_tokens for batch in batches) == 1000


def test_nothing_held_out_is_an_error_with_the_fix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(DataError, match=r"holds no document out.*val_files.*holdout_every"):
        held_out(LocalC4DataConfig(train_files=[str(tmp_path / "text.jsonl")]), tokenizer)


def test_unigram_perplexity_is_that_of_smoothed_frequencies() -> None:
    def batch(labels: list[int]) -> Batch:
        row = torch.tensor([labels])
        return Batch(row, row, None, 0, 1, sum(label != IGNORED for label in labels), lambda _: {})

    train = iter([batch([0, 0, 1]), batch([2, IGNORED, 0]), batch([3, 3, 3])])
    # Of the first two batches: counts 3, 1, 1, 0 of 5, smoothed over 4 words: 4/9, 2/9, 2/9, 1/9.
    expected = math.exp(-(2 * math.log(4 / 9) + math.log(1 / 9)) / 3)
    assert unigram_perplexity(train, 2, [batch([0, 3, 0, IGNORED])], 4) == pytest.approx(expected)
    assert next(train).num_label_tokens == 3
