"""SentencePiece models: ids, bytes, fingerprints, and files that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.config.schema import BuiltinDataConfig, SyntheticDataConfig
from ngpt.data.documents import DataError
from ngpt.data.tokenizer import Tokenizer


def test_special_ids_are_those_of_t5(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


def test_text_survives_encoding(tokenizer: Tokenizer) -> None:
    texts = ["river mountain copper.", "unseen words, caf\u00e9 \N{GRINNING FACE}", ""]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert not any(tokenizer.eos_id in ids for ids in encoded)


def test_documents_are_encoded_as_texts_are_and_closed(tokenizer: Tokenizer) -> None:
    texts = ["river mountain copper.", "nul \0 byte", "", " "]
    documents = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in documents] == [[*ids, tokenizer.eos_id] for ids in tokenizer.encode(texts)]
    assert all(ids.dtype == "int32" for ids in documents)


def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    text = "river mountain caf\u00e9 \N{GRINNING FACE} whistle"
    ids = tokenizer.encode([text])[0]
    assert int(tokenizer.token_bytes[ids].sum()) == len((" " + text).encode())  # SentencePiece puts a space before the text
    assert tokenizer.token_bytes[[0, 1, 2]].tolist() == [0, 0, 1]


def test_a_fingerprint_is_of_the_model_not_of_its_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "copy.model").write_bytes(tokenizer.model_bytes)
    assert Tokenizer.load(tmp_path / "copy.model").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("contents", [b"", b"this is no model", b"\x00" * 100])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, contents: bytes) -> None:
    """A tokenizer file that is none | refused"""
    (tmp_path / "broken.model").write_bytes(contents)
    with pytest.raises(DataError, match=r"broken.model: "):
        Tokenizer.load(tmp_path / "broken.model")


def test_a_missing_model_says_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.path=.*none.model: No such file.*data_prep.train_tokenizer"):
        Tokenizer.load(tmp_path / "none.model")


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(open_loader: Callable, tokenizer: Tokenizer) -> None:
    """A tokenizer with more ids than the model has | refused with both sizes, before training"""
    with pytest.raises(DataError, match=rf"model.vocab_size = 64: must be at least .* pieces, {tokenizer.vocab_size}; set"):
        open_loader(SyntheticDataConfig(), vocab_size=64)


def test_text_needs_a_tokenizer() -> None:
    from ngpt.data.loader import build_eval_batches
    from ngpt.dist.ranks import Ranks

    with pytest.raises(DataError, match="data=builtin needs a tokenizer"):
        build_eval_batches(
            BuiltinDataConfig(), None, vocab_size=64, seq_len=8, micro_batch_size=1, max_tokens=10, seed=0, ranks=Ranks(0, 1, 0)
        )
