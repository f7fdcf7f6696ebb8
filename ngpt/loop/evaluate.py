"""Held-out loss: a token-weighted mean over a fixed set of batches, and the published loop's arithmetic beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ngpt.data.batch import Batch
from ngpt.engine.base import Engine


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


def evaluate(engine: Engine, batches: Sequence[Batch], token_bytes: Tensor | None) -> EvalResult:
    """Evaluate the model on `batches`.

    Args:
        token_bytes: (vocab,) UTF-8 bytes that each token stands for, or None.

    Raises:
        ValueError: `batches` holds no label at all.
    """
    batches = [batch for batch in batches if batch.num_label_tokens]
    if not batches:
        raise ValueError("no held-out tokens to evaluate on: give data.val_files, or lower data.holdout_every")
    loss_sums = [engine.evaluate(batch.model_inputs()) for batch in batches]  # read once at the end: no synchronisation per batch
    sums = [loss_sum.item() for loss_sum in loss_sums]
    counts = [batch.num_label_tokens for batch in batches]
    text_bytes = 0
    if token_bytes is not None:
        text_bytes = sum(int(token_bytes[batch.labels[batch.labels >= 0]].sum()) for batch in batches)
    return EvalResult(
        loss=sum(sums) / sum(counts),
        loss_galore_protocol=sum(total / count for total, count in zip(sums, counts, strict=True)) / (len(batches) + 1),
        tokens=sum(counts),
        text_bytes=text_bytes,
    )
