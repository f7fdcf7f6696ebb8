"""Text from a model, token by token: how the next token is chosen, and how tokens become text while they still come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.data.tokenizer import Tokenizer
from ngpt.model.cache import KeyValueCache
from ngpt.model.llama import LlamaForCausalLM

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what SentencePiece makes of bytes that are no character yet


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. Raises ValueError for values out of bounds.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token, whatever the rest says.
        top_k: only so many of the most probable tokens; 0 for all.
        top_p: only the most probable tokens that together have this much of the probability (arXiv:1904.09751); 1 for all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: must be at least 0; 0 takes the most probable token, 0.8 is usual")
        if self.top_k < 0:
            raise ValueError(f"top-k = {self.top_k}: must be at least 0; 0 leaves all tokens in")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p = {self.top_p}: must be above 0 and at most 1; 1 leaves all tokens in")

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """A token, given logits on the CPU."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        return int(torch.multinomial(self.probabilities(logits_V), 1, generator=generator))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """(V,) fp32: from what `draw` draws, unless the temperature is 0."""
        ranked, token = (logits_V.float() / self.temperature).sort(descending=True, stable=True)
        share = ranked.softmax(dim=0)
        if self.top_k:
            share[self.top_k :] = 0
            share /= share.sum()
        share[share.cumsum(dim=0) - share >= self.top_p] = 0  # the first one always stays
        return torch.zeros_like(share).scatter_(0, token, share / share.sum())


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    prompt: Sequence[int],
    choice: Choice,
    *,
    num_tokens: int,
    seed: int,
    samples: int = 1,
    eos_id: int | None = None,
) -> Iterator[list[int | None]]:
    """Tokens that follow `prompt`, one of each sample at a time; None from a sample that has ended.

    Sample i is the same whatever the number of samples beside it, but for rounding. No generator but its own is drawn from.

    Args:
        prompt: at least one token; with `num_tokens` at most `max_seq_len` of the model (else ValueError).
        eos_id: the token that ends a sample, and is not given out; None: all go on to the end.
    """
    if not prompt:
        raise ValueError("a prompt must have at least one token; the EOS that closes every document is a beginning")
    weight = model.lm_head.weight
    cache = KeyValueCache(model.config, batch_size=samples, capacity=len(prompt) + num_tokens, device=weight.device, dtype=weight.dtype)
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + sample) for sample in range(samples)]
    new_ids = torch.tensor([list(prompt)] * samples, device=weight.device)
    ended = [False] * samples
    for _ in range(num_tokens):
        with _uncompiled(model):
            logits = model.next_logits(new_ids, cache).float().cpu()
        tokens = [choice.draw(row, generator) for row, generator in zip(logits, generators, strict=True)]
        ended = [over or token == eos_id for over, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, tokens, strict=True)]
        new_ids = torch.tensor(tokens, device=weight.device)[:, None]


def _uncompiled(model: LlamaForCausalLM) -> contextlib.AbstractContextManager[object]:
    """Blocks that were compiled for training run as they are: every length would be compiled anew."""
    compiled = any(block._compiled_call_impl is not None for block in model.model.layers)
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


class TextStream:
    """Text of tokens that still come, each character as soon as no later token can change it.

    SentencePiece spells rare characters in bytes, a token each, so a character may need up to four tokens; and the first space
    of a text is not said. Hence text is decoded behind some tokens that are settled, and given out without them.

    Args:
        prompt: tokens before those that come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._settled = list(prompt)
        self._open: list[int] = []

    def add(self, token: int) -> str:
        """What one more token lets be said; empty where a character is not finished."""
        self._open.append(token)
        text = self._text()
        if text.endswith(_UNFINISHED):
            return ""
        if text:  # a control token says nothing, and would be nothing to stand behind
            self._settled, self._open = self._open, []
        return text

    def rest(self) -> str:
        """What has not been said at the end, bytes that are no character among it."""
        text, self._open = self._text(), []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._settled)
        return self._tokenizer.decode(self._settled + self._open)[len(before) :]


def encode_prompt(tokenizer: Tokenizer, text: str, bos_id: int | None) -> list[int]:
    """Tokens of a prompt: behind the BOS of models that were trained with one; the EOS before a document where there is no text."""
    ids = tokenizer.encode([text])[0]
    before = [] if bos_id is None else [bos_id]
    return before + ids or [tokenizer.eos_id]
