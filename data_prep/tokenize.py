"""Tokenise text to shards: python -m data_prep.tokenize --files 'c4/*.json.gz' --tokenizer spiece.model --out tokens --workers 8"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ngpt.config import command_line
from ngpt.data.atomic import atomic_file
from ngpt.data.documents import DataError, Share, SkippedDocuments
from ngpt.data.json_lines import JsonLinesSource, expand_globs
from ngpt.data.stream import read_in_order
from ngpt.data.token_shards import MANIFEST, Manifest, Shard, smallest_dtype
from ngpt.data.tokenizer import Tokenizer
from ngpt.dist.exit_codes import EXIT_USER_ERROR

EXAMPLES = """
python -m data_prep.tokenize --files 'c4/*.json.gz' --tokenizer spiece.model --out tokens
python -m data_prep.tokenize --files a.jsonl 'b/*.json.zst' --tokenizer tokenizer.model --out tokens --workers 8

then train with data=tokenized data.train_files='[tokens]'"""


def tokenize_file(source: str, target: Path, tokenizer: Tokenizer, max_bad_documents: int) -> Shard:
    """Write the documents of one file as one shard. Raises DataError above `max_bad_documents`; nothing is left behind then."""
    dtype = np.dtype(smallest_dtype(tokenizer.vocab_size)).newbyteorder("<")
    skipped = SkippedDocuments(max_bad_documents)
    documents, tokens, digest = 0, 0, hashlib.sha256()
    reader = JsonLinesSource([source], [], None).open(Share("train"), None, skipped.tally())
    with atomic_file(target) as out:
        for block in read_in_order(reader, tokenizer.encode_documents, tokenizer.eos_id):
            data = block.tokens.astype(dtype).tobytes()
            out.write(data)
            digest.update(data)
            documents, tokens = documents + len(block.places), tokens + len(block.tokens)
    return Shard(
        file=target.name,
        source=os.path.basename(source),
        tokens=tokens,
        documents=documents,
        bytes=tokens * dtype.itemsize,
        sha256=digest.hexdigest(),
        **skipped.totals,
    )


class Job:
    """One folder of shards, one shard per file of text. Finished shards have a note beside them, and are kept on a restart."""

    def __init__(self, files: list[str], tokenizer_path: str, out: Path, *, max_bad_documents: int) -> None:
        self.files = files
        self.tokenizer_path = tokenizer_path
        self.out = out
        self.max_bad_documents = max_bad_documents
        self._tokenizer = Tokenizer.load(tokenizer_path)

    def target(self, index: int) -> Path:
        return self.out / f"shard-{index:05d}.bin"

    def finished(self, index: int) -> Shard | None:
        """The shard of file `index`, if it is there already, made from this file by this tokenizer."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(self._note(index).read_bytes())
            if note["made_from"] == self._made_from(index) and self.target(index).stat().st_size == note["shard"]["bytes"]:
                return Shard(**note["shard"])
        return None

    def record(self, index: int, shard: Shard) -> None:
        with atomic_file(self._note(index)) as out:
            out.write(json.dumps({"made_from": self._made_from(index), "shard": asdict(shard)}).encode())

    def finish(self, shards: list[Shard]) -> Manifest:
        """Write the manifest, which makes the folder complete."""
        model = self._tokenizer
        manifest = Manifest(model.fingerprint, model.vocab_size, model.eos_id, smallest_dtype(model.vocab_size), tuple(shards))
        with atomic_file(self.out / MANIFEST) as out:
            out.write(manifest.dump())
        for index in range(len(self.files)):
            self._note(index).unlink(missing_ok=True)
        return manifest

    def clean(self) -> None:
        """Remove what a killed process has left half-written. Raises DataError if the folder is complete already."""
        if (self.out / MANIFEST).exists():
            raise DataError(f"--out {self.out} holds a finished set of shards already; give another folder, or remove it first")
        self.out.mkdir(parents=True, exist_ok=True)
        for leftover in self.out.glob(".shard-*"):
            leftover.unlink(missing_ok=True)

    def _note(self, index: int) -> Path:
        return self.out / f"shard-{index:05d}.json"

    def _made_from(self, index: int) -> dict[str, object]:
        file = self.files[index]
        status = os.stat(file)
        return {
            "source": os.path.basename(file),
            "bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,  # an edit may leave the size as it was
            "tokenizer": self._tokenizer.fingerprint,
        }


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_path: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.load(tokenizer_path)
    _worker_tokenizer.threads = 1


def _work(index: int, source: str, target: Path, max_bad_documents: int) -> tuple[int, Shard]:
    assert _worker_tokenizer is not None
    return index, tokenize_file(source, target, _worker_tokenizer, max_bad_documents)


def run(job: Job, workers: int) -> Iterator[tuple[int, Shard]]:
    """Tokenise what is not finished, largest files first, each in a process of its own choosing; yields shards as they finish."""
    todo = [index for index in range(len(job.files)) if job.finished(index) is None]
    todo.sort(key=lambda index: -os.path.getsize(job.files[index]))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, min(workers, len(todo))), context, initializer=_start_worker, initargs=(job.tokenizer_path,))
    with pool:
        futures = [pool.submit(_work, index, job.files[index], job.target(index), job.max_bad_documents) for index in todo]
        try:
            for future in as_completed(futures):
                index, shard = future.result()
                job.record(index, shard)
                yield index, shard
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def tokenize(job: Job, workers: int) -> Manifest:
    """The whole job, with a progress bar where standard error is a terminal. Raises DataError."""
    job.clean()
    shards = {index: shard for index in range(len(job.files)) if (shard := job.finished(index))}
    if shards:
        print(f"continuing: {len(shards)} of {len(job.files)} shards are finished")
    _check_bad_documents(shards, job)
    with tqdm(total=len(job.files), initial=len(shards), unit="shard", disable=not sys.stderr.isatty()) as bar:
        for index, shard in run(job, workers):
            shards[index] = shard
            bar.update()
            bar.set_postfix(tokens=f"{sum(each.tokens for each in shards.values()):,}")
            _check_bad_documents(shards, job)
    return job.finish([shards[index] for index in range(len(job.files))])


def _check_bad_documents(shards: dict[int, Shard], job: Job) -> None:
    """Raise DataError if the finished shards, those of earlier attempts included, skipped more documents than the limit."""
    bad = sum(shard.bad_documents for shard in shards.values())
    if bad > job.max_bad_documents:
        raise DataError(
            f"{bad} bad documents, more than --max-bad-documents={job.max_bad_documents}; "
            "the warnings name them: repair the files, or raise the limit"
        )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("Tokenise text to shards; restart it to continue.", EXAMPLES, prog="python -m data_prep.tokenize")
    parser.add_argument("--files", nargs="+", required=True, metavar="GLOB", help="*.json.gz, *.jsonl, *.json.zst: objects with `text`")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a SentencePiece .model file")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the shards and their manifest.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--max-bad-documents", type=int, default=100, help="bad documents that are skipped before it stops (default 100)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _arguments(argv)
    began = time.perf_counter()
    try:
        files = expand_globs(arguments.files, option="--files")
        job = Job(files, arguments.tokenizer, arguments.out, max_bad_documents=arguments.max_bad_documents)
        manifest = tokenize(job, arguments.workers)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    seconds = time.perf_counter() - began
    totals = manifest.totals()
    print(f"{arguments.out}: {len(manifest.shards)} shards of {manifest.dtype} in {seconds:.1f} s")
    print(f"{totals['tokens']:,} tokens of {totals['documents']:,} documents")
    print(f"skipped: {totals['bad_documents']} bad documents, {totals['empty_documents']} empty ones")
    return 0


if __name__ == "__main__":
    sys.exit(main())
