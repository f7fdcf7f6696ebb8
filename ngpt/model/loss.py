"""Head and loss: chunked linear + cross-entropy that never holds the logits of all positions at one time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngpt.model.layers import Linear

IGNORE_INDEX = -100


class LanguageModelHead(Linear):
    """The map from hidden states to logits, and the loss on them, so that the weight is used in this module's forward only."""

    def __init__(self, hidden_size: int, vocab_size: int, *, std: float, loss_chunk_tokens: int) -> None:
        super().__init__(hidden_size, vocab_size, std=std)
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(self, hidden_BTH: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) without labels; with labels the sum of token cross-entropies, see `chunked_cross_entropy`."""
        if labels_BT is None:
            return super().forward(hidden_BTH)
        return chunked_cross_entropy(hidden_BTH, self.weight, labels_BT, chunk_tokens=self.loss_chunk_tokens)


def chunked_cross_entropy(hidden: Tensor, weight_VH: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` against `labels`, nats, an fp32 scalar (fp64 for fp64 weights).

    `hidden` (..., H); `labels` (...), IGNORE_INDEX where a position does not count. `chunk_tokens` positions' logits exist at a time.
    Raises ValueError for labels of another shape and, on the CPU, for a label that is no token (on a GPU that is a
    device-side assertion: checking first would wait for the device at every step).
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, hidden states {tuple(hidden.shape)}: one label a position is needed")
    _check_range(labels, weight_VH.shape[0])
    recording = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight_VH,
        labels.reshape(-1),
        chunk_tokens,
        recording and hidden.requires_grad,
        recording and weight_VH.requires_grad,
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Both gradients are computed in the forward pass, while a chunk's logits exist.

    The loss is the last operation of a model, so its backward follows at once; recomputing the logits there would cost a
    fourth product with the head's matrix and save no memory. Backward multiplies by the incoming scalar, in place (a second
    backward through the same graph raises torch's own error), and hands over ONE gradient for the weight, whatever the number of
    chunks: hooks on it fire once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, labels_P: Tensor, chunk_tokens: int, needs_hidden: bool, needs_weight: bool
    ) -> Tensor:
        positions, dtype = hidden_PH.shape[0], _wide(weight_VH.dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden_PH.device)
        grad_hidden_PH = torch.empty_like(hidden_PH) if needs_hidden else None
        # Chunks are summed in fp32: a bf16 sum is rounded once a chunk, and its error grows with their number.
        sum_dtype = dtype if positions > chunk_tokens else weight_VH.dtype
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=sum_dtype) if needs_weight else None
        for start in range(0, positions, chunk_tokens):
            hidden_CH, labels_C = hidden_PH[start : start + chunk_tokens], labels_P[start : start + chunk_tokens]
            chunk_loss, grad_logits_CV = _loss_and_logits_gradient(hidden_CH, weight_VH, labels_C, needs_hidden or needs_weight)
            loss += chunk_loss
            if grad_logits_CV is None:
                continue
            if grad_hidden_PH is not None:
                torch.mm(grad_logits_CV, weight_VH, out=grad_hidden_PH[start : start + chunk_tokens])
            if grad_weight_VH is not None:
                _add_product_(grad_weight_VH, grad_logits_CV.T, hidden_CH)
            del grad_logits_CV  # before the next chunk's is made
        ctx.save_for_backward(grad_hidden_PH, grad_weight_VH)
        ctx.weight_dtype = weight_VH.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_PH, grad_weight_VH = ctx.saved_tensors
        if grad_hidden_PH is not None:
            grad_hidden_PH.mul_(grad_loss)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden_PH, grad_weight_VH, None, None, None, None


def _loss_and_logits_gradient(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk, and its gradient by the logits, (C, V) in the weight's dtype.

    At most two (C, V) matrices of fp32 live at one time.
    """
    ignored_C1 = (labels_C == IGNORE_INDEX)[:, None]
    label_C1 = labels_C[:, None].masked_fill(ignored_C1, 0)
    log_probs_CV = (hidden_CH @ weight_VH.T).to(_wide(weight_VH.dtype)).log_softmax(dim=-1)
    loss = -log_probs_CV.gather(1, label_C1).masked_fill_(ignored_C1, 0).sum()
    if not needs_gradient:
        return loss, None
    softmax_CV = log_probs_CV.exp_()
    grad_CV = softmax_CV.scatter_add_(1, label_C1, softmax_CV.new_full((1, 1), -1.0).expand_as(label_C1))
    return loss, grad_CV.masked_fill_(ignored_C1, 0).to(weight_VH.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where that is the type already."""
    return torch.promote_types(dtype, torch.float32)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary where the types allow."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)  # `addmm_` is the same, but torch.utils.flop_counter does not count it
    else:
        total += a @ b


def _check_range(labels: Tensor, vocab_size: int) -> None:
    if labels.device.type != "cpu":
        return
    wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"label {int(wrong[0])} is no token: labels are 0 to {vocab_size - 1}, or {IGNORE_INDEX} where a position does not count; "
            "use a tokenizer whose vocabulary fits model.vocab_size"
        )
