"""SentencePiece: text to token ids and back. Any `.model` works, T5's `spiece.model` included."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from ngpt.data.documents import DataError

_THREADS = 4


class Tokenizer:
    """A loaded SentencePiece model.

    Attributes: `vocab_size` ids, `eos_id` closes every document, `pad_id` fills rows (the EOS where the model has no padding id), `bos_id`
    is what some foreign models were trained to see before every text (None where there is no such id; our runs use none),
    `model_bytes` and their sha256 `fingerprint`, `threads` used by `encode`.
    """

    def __init__(self, model_bytes: bytes, *, name: str = "tokenizer") -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name}: not a SentencePiece model ({str(error).strip() or 'cannot be parsed'})") from error
        self.model_bytes = model_bytes
        self.fingerprint = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{name}: the model has no EOS id, which closes every document; train it with eos_id >= 0")
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.threads = min(_THREADS, os.cpu_count() or 1)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file. Raises DataError if it is missing, or is no SentencePiece model with an EOS."""
        try:
            return cls(Path(path).expanduser().read_bytes(), name=str(path))
        except OSError as error:
            raise DataError(
                f"tokenizer.path={path}: {error.strerror}. Train one with `python -m data_prep.train_tokenizer --files GLOB --out PATH`"
            ) from error

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without EOS. Runs on `threads` threads of SentencePiece's own."""
        return self._processor.encode(texts, out_type=int, num_threads=self.threads)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, closed by EOS, as int32 arrays: no Python object per token, so it is faster than `encode`."""
        return self._processor.encode(texts, return_type="numpy", add_eos=True, num_threads=self.threads)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(list(ids))

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """(vocab,) int64: UTF-8 bytes of text that each id stands for, to turn token losses into bits per byte.

        Control ids stand for none, byte ids for one. An unknown-id stands for at least one, which is what it counts here. The bytes
        are those of the text as SentencePiece normalises it, one leading space per document included.
        """
        processor = self._processor
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        for index in range(self.vocab_size):
            if processor.is_byte(index) or processor.is_unknown(index):
                lengths[index] = 1
            elif not (processor.is_control(index) or processor.is_unused(index)):
                lengths[index] = len(processor.id_to_piece(index).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())
        return lengths
