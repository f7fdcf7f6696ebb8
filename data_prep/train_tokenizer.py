"""Train a SentencePiece tokenizer: python -m data_prep.train_tokenizer --files 'text/*.jsonl' --vocab-size 16000 --out tokenizer.model"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from ngpt.config import command_line
from ngpt.data.atomic import atomic_file
from ngpt.data.builtin import standard_library_prose
from ngpt.data.documents import DataError, Document, Share, SkippedDocuments
from ngpt.data.json_lines import JsonLinesSource, expand_globs
from ngpt.data.tokenizer import Tokenizer
from ngpt.dist.exit_codes import EXIT_USER_ERROR

EXAMPLES = """
python -m data_prep.train_tokenizer --files 'text/*.jsonl' --vocab-size 16000 --out tokenizer.model
python -m data_prep.train_tokenizer --builtin --vocab-size 4096 --out tokenizer.model

then train with tokenizer.path=tokenizer.model model.vocab_size=16000"""

_LONGEST_PIECE_OF_TEXT = 4000
# The sums of the trainer depend on the number of threads: a fixed one gives the same model on every machine.
_TRAINING_THREADS = 4


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece unigram model of exactly `vocab_size` ids, serialised.

    Padding, EOS and unknown have T5's ids 0, 1, 2, and there is no BOS. A newline is a token; any other character that the model
    does not know is spelt in bytes. The same texts give the same model. Raises DataError if the text is too small, or too varied,
    for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_paragraphs(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            max_sentence_length=4 * _LONGEST_PIECE_OF_TEXT + 1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).split("] ")[-1].strip()
        raise DataError(f"no vocabulary of --vocab-size={vocab_size} can be made of this text: {reason or 'there is none'}") from error
    return model.getvalue()


def sample_documents(files: list[str], max_bytes: int, skipped: SkippedDocuments) -> Iterator[Document]:
    """Documents from the beginning of every file, about as much of each, `max_bytes` of text in all."""
    for index, file in enumerate(files):
        share, used = (max_bytes * (index + 1)) // len(files) - (max_bytes * index) // len(files), 0
        for document in JsonLinesSource([file], [], None).open(Share("train"), None, skipped.tally()):
            if used >= share:
                break
            used += len(document.text.encode())
            yield document


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """SentencePiece learns from lines, and drops those that are too long."""
    for line in itertools.chain.from_iterable(text.splitlines() for text in texts):
        for first in range(0, len(line), _LONGEST_PIECE_OF_TEXT):
            yield line[first : first + _LONGEST_PIECE_OF_TEXT]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("Train a SentencePiece tokenizer.", EXAMPLES, prog="python -m data_prep.train_tokenizer")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--files", nargs="+", metavar="GLOB", help="text: *.json.gz, *.jsonl, *.json.zst, one object with `text` a line")
    text.add_argument("--builtin", action="store_true", help="the English prose of Python's standard library")
    parser.add_argument("--vocab-size", type=int, required=True, help="ids of the tokenizer, and rows of the model's embedding")
    parser.add_argument("--out", required=True, metavar="PATH", help="the .model file to write")
    parser.add_argument("--max-megabytes", type=float, default=50.0, help="text to learn from, taken evenly from all files (default 50)")
    parser.add_argument("--max-bad-documents", type=int, default=100, help="bad documents that are skipped before it stops (default 100)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _arguments(argv)
    began = time.perf_counter()
    skipped = SkippedDocuments(arguments.max_bad_documents)
    try:
        if arguments.builtin:
            documents = standard_library_prose()
        else:
            files = expand_globs(arguments.files, option="--files")
            documents = list(sample_documents(files, int(arguments.max_megabytes * 1e6), skipped))
        tokenizer = Tokenizer(train_tokenizer((document.text for document in documents), arguments.vocab_size))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    with atomic_file(arguments.out) as out:
        out.write(tokenizer.model_bytes)
    _report(tokenizer, documents, Path(arguments.out), time.perf_counter() - began)
    return 0


def _report(tokenizer: Tokenizer, documents: list[Document], path: Path, seconds: float) -> None:
    characters = sum(len(document.text) for document in documents)
    text = documents[len(documents) // 2].text[:2000]
    ids = tokenizer.encode([text])[0]
    print(f"{path}: {tokenizer.vocab_size} ids, trained on {characters / 1e6:.1f} MB ({len(documents)} documents) in {seconds:.1f} s")
    print(f"sample ({len(text) / len(ids):.2f} characters a token): {' | '.join(tokenizer.decode([i]) for i in ids[:24])}")


if __name__ == "__main__":
    sys.exit(main())
