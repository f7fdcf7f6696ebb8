"""Held-out loss: a token-weighted mean over a fixed set of batches, and the published loop's arithmetic beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ngpt.data.batch import Batch
from ngpt.dist.collectives import Collectives


class Evaluates(Protocol):
    """What is evaluated: the part of an engine that this needs."""

    device: torch.device

    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Sum of token losses of one batch, an fp32 scalar."""
        ...


@dataclass(frozen=True)
class EvalResult:
    """Held-out loss in nats a token.

    `loss` is the sum of token losses over the number of tokens. `loss_galore_protocol` is what the evaluation loop of GaLore's
    release computes on the same batches: the mean loss of each batch, summed and divided by one more than their number. It is
    lower than the truth by a factor n / (n + 1) and there only to compare with published figures. `text_bytes` is the
    UTF-8 length of the text that the tokens stand for, 0 where it is not known.
    """

    loss: float
    loss_galore_protocol: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def perplexity_galore_protocol(self) -> float:
        return perplexity(self.loss_galore_protocol)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers; None where the bytes are not known."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes if self.text_bytes else None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows a float."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def evaluate(
    engine: Evaluates,
    batches: Sequence[Batch],
    token_bytes: Tensor | None,
    collectives: Collectives,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Evaluate the model on the batches of all ranks.

    Args:
        batches: this rank's, as many as any other's: engines may communicate in each of them, so none is left out, labels or not.
        token_bytes: (vocab,) UTF-8 bytes that each token stands for, or None.
        on_batch: called before each batch, as a sign of progress.

    Raises:
        ValueError: there is no label at all.
    """
    loss_sums = []  # read once at the end: no synchronisation per batch
    for batch in batches:
        on_batch()
        loss_sums.append(engine.evaluate(batch.model_inputs()))
    labelled = [(loss_sum.item(), batch) for loss_sum, batch in zip(loss_sums, batches, strict=True) if batch.num_label_tokens]
    of_this_rank = [
        sum(loss_sum for loss_sum, _ in labelled),
        sum(loss_sum / batch.num_label_tokens for loss_sum, batch in labelled),
        len(labelled),
        sum(batch.num_label_tokens for _, batch in labelled),
        0 if token_bytes is None else sum(int(token_bytes[batch.labels[batch.labels >= 0]].sum()) for _, batch in labelled),
    ]
    totals = collectives.sum_(torch.tensor(of_this_rank, dtype=torch.float64, device=engine.device)).tolist()
    total_loss, total_of_means, num_batches, tokens, text_bytes = totals
    if not tokens:
        raise ValueError("no held-out tokens to evaluate on: give data.val_files, or lower data.holdout_every")
    return EvalResult(
        loss=total_loss / tokens,
        loss_galore_protocol=total_of_means / (num_batches + 1),
        tokens=int(tokens),
        text_bytes=int(text_bytes),
    )
