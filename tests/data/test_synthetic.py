"""Synthetic text: seeded, over the whole vocabulary, and with something to learn."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from ngpt.config.schema import SyntheticDataConfig
from ngpt.data.documents import DataError
from ngpt.data.loader import build_train_loader
from ngpt.data.synthetic import EOS_ID, SyntheticBlocks, SyntheticLanguage
from ngpt.dist.ranks import Ranks


def test_documents_depend_on_seed_stream_and_number_alone() -> None:
    language = SyntheticLanguage(100, 20, seed=1)
    tokens, starts = language.documents("train/0", 0, 8)
    later, _ = language.documents("train/0", 5, 1)
    assert tokens[starts[5] : starts[6]].tolist() == later.tolist()
    for other in (SyntheticLanguage(100, 20, seed=2).documents("train/0", 0, 8), language.documents("train/1", 0, 8)):
        assert other[0].tolist() != tokens.tolist()


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    _, starts = SyntheticLanguage(100, 50, seed=0).documents("train/0", 0, 2000)
    assert np.diff(starts).mean() - 1 == pytest.approx(50, abs=2)  # the EOS is not counted


def test_the_whole_vocabulary_is_used() -> None:
    tokens, _ = SyntheticLanguage(64, 512, seed=0).documents("train/0", 0, 100)
    assert set(tokens.tolist()) == set(range(1, 64))


def test_a_model_of_pairs_beats_a_model_of_single_words_by_far() -> None:
    tokens = SyntheticLanguage(64, 512, seed=0).documents("train/0", 0, 400)[0].tolist()
    singles, pairs = Counter(tokens), Counter(itertools.pairwise(tokens))
    unigram = -sum(n * math.log(n / len(tokens)) for n in singles.values()) / len(tokens)
    bigram = -sum(n * math.log(n / singles[pair[0]]) for pair, n in pairs.items()) / len(tokens)
    assert unigram > 3.0
    assert bigram < 0.6 * unigram


def test_every_document_ends_with_its_only_eos() -> None:
    block = SyntheticBlocks(SyntheticLanguage(100, 20, seed=1), "train/0").next_block()
    assert (np.flatnonzero(block.tokens == EOS_ID) == block.starts[1:] - 1).all()


def test_no_tokenizer_is_needed() -> None:
    sizes = {"vocab_size": 50, "seq_len": 8, "micro_batch_size": 2, "global_batch_size": 2}
    loader = build_train_loader(SyntheticDataConfig(), None, seed=0, ranks=Ranks(0, 1, 0), **sizes)
    assert next(loader).input_ids.shape == (2, 8)
    loader.close()


def test_a_vocabulary_without_words_is_refused(open_loader: Callable) -> None:
    with pytest.raises(DataError, match="vocab_size >= 4"):
        SyntheticLanguage(3, 20, seed=0)
