"""The unigram baseline: what a model scores that knows how frequent each token is, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import torch

from ngpt.data.batch import Batch
from ngpt.data.packing import IGNORED
from ngpt.dist.collectives import Collectives


def unigram_perplexity(
    train_batches: Iterable[Batch],
    num_batches: int,
    eval_batches: Sequence[Batch],
    vocab_size: int,
    *,
    collectives: Collectives | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Held-out perplexity of add-one smoothed frequencies of the labels of the first `num_batches` training batches.

    exp(-mean log((count(token) + 1) / (total + vocab_size))) over the labels of `eval_batches`.

    Args:
        num_batches: how many of this rank's batches were trained on.
        collectives: the ranks over which counts are added up, as tensors on `device`; None: this process is alone.
    """
    counts = torch.stack([_label_counts(islice(train_batches, num_batches), vocab_size), _label_counts(eval_batches, vocab_size)])
    if collectives is not None:
        counts = collectives.sum_(counts.to(device)).cpu()
    train_counts, eval_counts = counts
    log_probability = torch.log((train_counts + 1) / (train_counts.sum() + vocab_size))
    return math.exp(-float((eval_counts * log_probability).sum() / eval_counts.sum()))


def _label_counts(batches: Iterable[Batch], vocab_size: int) -> torch.Tensor:
    """(vocab,) float64: how often each token is a label that counts."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.labels[batch.labels != IGNORED].cpu(), minlength=vocab_size)
    return counts
