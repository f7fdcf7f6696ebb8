"""Held-out loss is exact, and the published loop's arithmetic is reproduced beside it."""

from __future__ import annotations

import math

import pytest
import torch

from ngpt.dist.collectives import Collectives
from ngpt.loop.evaluate import evaluate, perplexity


def test_loss_is_weighted_by_tokens(engine, make_batch):
    result = evaluate(engine, [make_batch(0, 1, 6.0), make_batch(1, 3, 6.0)], None, Collectives())
    assert result.loss == pytest.approx(12 / 4)
    assert result.tokens == 4
    assert result.perplexity == pytest.approx(math.exp(3))
    assert result.bits_per_byte is None


def test_a_constant_loss_model_shows_the_published_loops_bias(engine, make_batch):
    batches = [make_batch(i, 5, 5 * 2.0) for i in range(4)]
    result = evaluate(engine, batches, None, Collectives())
    assert result.loss == pytest.approx(2.0)
    assert result.loss_galore_protocol == pytest.approx(2.0 * 4 / 5)  # its counter starts at 1
    assert result.perplexity_galore_protocol == pytest.approx(math.exp(1.6))


def test_bits_per_byte_counts_the_bytes_behind_the_labels_only(engine, make_batch):
    token_bytes = torch.tensor([3, 100])
    result = evaluate(engine, [make_batch(0, 4, 6.0), make_batch(1, 0, 0.0)], token_bytes, Collectives())  # four labels, all token 0
    assert result.text_bytes == 12
    assert result.bits_per_byte == pytest.approx(6.0 / math.log(2) / 12)


def test_nothing_to_evaluate_on_is_an_error(engine, make_batch):
    with pytest.raises(ValueError, match="no held-out tokens"):
        evaluate(engine, [make_batch(0, 0, 0.0)], None, Collectives())


def test_perplexity_of_a_hopeless_loss_is_infinite_and_of_nan_is_nan():
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
