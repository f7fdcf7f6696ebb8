"""A SentencePiece model as the tokenizer files of a Hugging Face folder: the same ids, from the `tokenizers` library.

What SentencePiece does to a text is spelt out in tokenizer.json: its table of characters, spaces at the ends and in a row, the
space before the first word, and user-defined pieces, which the table must not touch. Three things differ between the libraries:

- Sums of scores are kept in fp32 by SentencePiece and in fp64 by `tokenizers`: of two ways to cut a word that cost the same to seven
  digits they may take different ones.
- `tokenizers` looks up a letter together with the marks that follow it, SentencePiece whatever is longest: marks behind letters
  that the table replaces (half-width katakana, ligatures, fractions) can come out otherwise.
- Text that spells the name of a piece, such as </s>, is that piece to Hugging Face's tokenizers, and text to SentencePiece.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ngpt.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes one
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
_NEVER = -1000.0  # score of pieces that no text gives: control pieces, and bytes, which are for what is not known otherwise
_PLACEHOLDERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # characters that Unicode keeps out of all text


def tokenizer_files(tokenizer: Tokenizer, *, max_tokens: int) -> dict[str, bytes]:
    """Names and contents of the files. Without tokenizer.json, and with a warning, for models that are neither unigram nor BPE.

    Args:
        max_tokens: of the model's longest sequence.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)  # type: ignore[attr-defined]
    names = {name: proto.pieces[index].piece for name, index in _special_ids(tokenizer).items() if index is not None}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,  # no run of ours saw one
        "add_eos_token": False,
        "bos_token": None,
        **{f"{name}_token": piece for name, piece in names.items()},
    }
    files = {"tokenizer.model": tokenizer.model_bytes, "tokenizer_config.json": _json(settings)}
    if proto.trainer_spec.model_type in (_UNIGRAM, _BPE):
        files["tokenizer.json"] = _json(_tokenizer_json(proto, tokenizer))
    else:
        logger.warning(
            "no tokenizer.json for this kind of SentencePiece model, only tokenizer.model: use it with the sentencepiece package"
        )
    return files


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    return {"eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": processor.unk_id(), "bos": tokenizer.bos_id}


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, indent=1) + "\n").encode()


def _tokenizer_json(proto: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    special = [
        {"id": index, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for index, piece in enumerate(proto.pieces)
        if piece.type in (_UNKNOWN, _CONTROL)
    ]
    begins_with_space = proto.normalizer_spec.add_dummy_prefix
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if begins_with_space else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(proto))},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto),
    }


def _normalizers(proto: Any) -> Iterator[dict[str, Any]]:
    """Its steps in SentencePiece's order."""
    spec = proto.normalizer_spec
    kept = dict(zip([piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED], _PLACEHOLDERS, strict=False))
    if spec.precompiled_charsmap:
        yield from (_replace(piece, placeholder) for piece, placeholder in kept.items())
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
        yield from (_replace(placeholder, piece) for piece, placeholder in kept.items())
    if spec.remove_extra_whitespaces:
        yield {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    yield _replace(" ", SPACE)
    if spec.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _unigram(proto: Any) -> dict[str, Any]:
    best = max(piece.score for piece in proto.pieces if piece.type == _NORMAL)

    def score(piece: Any) -> float:
        if piece.type == _USER_DEFINED:
            return len(piece.piece) * best - 0.1  # as SentencePiece does; such a piece is always taken
        return piece.score if piece.type == _NORMAL else _NEVER

    return {
        "type": "Unigram",
        "unk_id": next(index for index, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN),
        "vocab": [[piece.piece, score(piece)] for piece in proto.pieces],
        "byte_fallback": any(piece.type == _BYTE for piece in proto.pieces),
    }


def _bpe(proto: Any) -> dict[str, Any]:
    """Merges are all pairs of pieces that make a piece; of those that a text offers, the one that makes the best piece comes first."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    pairs = [
        (-piece.score, ids[piece.piece[:cut]], ids[piece.piece[cut:]], [piece.piece[:cut], piece.piece[cut:]])
        for piece in proto.pieces
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in ids and piece.piece[cut:] in ids
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN),
        "fuse_unk": True,
        "byte_fallback": any(piece.type == _BYTE for piece in proto.pieces),
        "vocab": ids,
        "merges": [pair for *_, pair in sorted(pairs)],
    }
