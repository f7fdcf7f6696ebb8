"""Seeded synthetic text over a whole vocabulary: something to learn, without files and without a tokenizer."""

from __future__ import annotations

import numpy as np

from ngpt.data.documents import JSON, DataError
from ngpt.data.packing import TokenBlock
from ngpt.data.seeding import derive_seed, permutation

PAD_ID, EOS_ID = 0, 1
_FIRST_WORD = 2
_LONGEST_CHAIN = 8
_FRESH_SHARE = 0.25
_BLOCK_DOCUMENTS = 32


class SyntheticLanguage:
    """A Markov chain: with probability 1/4 (and after 8 words at the latest) a word is drawn from a Zipf law over the vocabulary,
    otherwise it is the one fixed successor of the word before it (a random permutation of the vocabulary).
    """

    def __init__(self, vocab_size: int, document_tokens: int, seed: int) -> None:
        if vocab_size < _FIRST_WORD + 2:
            raise DataError(f"data=synthetic needs model.vocab_size >= {_FIRST_WORD + 2} (padding, EOS and two words), not {vocab_size}")
        words = vocab_size - _FIRST_WORD
        self._seed = seed
        self._document_tokens = document_tokens
        frequency = 1.0 / np.arange(1, words + 1)
        self._cumulative = np.cumsum(frequency / frequency.sum())
        by_frequency = permutation(words, derive_seed(seed, "frequency"))
        successor = permutation(words, derive_seed(seed, "successor"))
        self._chains = np.empty((_LONGEST_CHAIN, words), dtype=np.int32)  # [k, i]: k-th successor of the i-th most frequent word
        self._chains[0] = by_frequency
        for step in range(1, _LONGEST_CHAIN):
            self._chains[step] = successor[self._chains[step - 1]]
        self._chains += _FIRST_WORD

    def documents(self, stream: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and starts of `count` documents: their lengths are uniform in [1, 2 * document_tokens - 1], EOS not counted."""
        pieces = [self._document(derive_seed(self._seed, stream, index)) for index in range(first, first + count)]
        return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])

    def _document(self, seed: int) -> np.ndarray:
        # Raw draws, not Generator methods: see seeding.permutation.
        bits = np.random.PCG64(seed)
        length = 1 + int(bits.random_raw() % (2 * self._document_tokens - 1))
        draws = bits.random_raw(2 * length).reshape(2, length) / 2.0**64
        fresh = draws[0] < _FRESH_SHARE
        fresh[0] = True
        position = np.arange(length)
        since_fresh = position - np.maximum.accumulate(np.where(fresh, position, 0))
        step = since_fresh % _LONGEST_CHAIN
        word = np.searchsorted(self._cumulative[:-1], draws[1], side="right")
        return np.append(self._chains[step, word[position - step]], EOS_ID).astype(np.int32)


class SyntheticBlocks:
    """One logical stream of synthetic documents (a `packing.BlockSource`); it never ends, so there is one epoch."""

    def __init__(self, language: SyntheticLanguage, stream: str) -> None:
        self._language = language
        self._stream = stream
        self._document = 0

    def next_block(self) -> TokenBlock:
        first = self._document
        tokens, starts = self._language.documents(self._stream, first, _BLOCK_DOCUMENTS)
        self._document += _BLOCK_DOCUMENTS
        places = [(f"synthetic/{self._stream}", first + i + 1) for i in range(_BLOCK_DOCUMENTS)]
        return TokenBlock(tokens, starts, places, 0, lambda i: {"epoch": 0, "document": first + i})

    def state(self) -> dict[str, JSON]:
        return {"epoch": 0, "document": self._document}

    def seek(self, state: dict[str, JSON]) -> None:
        self._document = state["document"]
