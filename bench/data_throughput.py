"""Tokens per second of every source, and the streaming pipeline against SentencePiece's bare `encode` of the same documents.

    python -m bench.data_throughput --files 'text/*.json.gz' --tokenizer tokenizer.model --runs 5

The ratio is measured in one process, bare and streamed in turn, with the same batches of documents and the same threads. `c4` reads the
same files through `datasets`, as it reads the hub's, so that its row measures everything but the network.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import datasets

from data_prep.tokenize import Job, tokenize_file
from ngpt.config.schema import BuiltinDataConfig, C4DataConfig, DataConfig, LocalC4DataConfig, SyntheticDataConfig, TokenizedDataConfig
from ngpt.data import sources
from ngpt.data.documents import Share, SkippedDocuments
from ngpt.data.json_lines import JsonLinesSource, expand_globs
from ngpt.data.loader import build_train_loader
from ngpt.data.tokenizer import Tokenizer
from ngpt.dist.ranks import Ranks

_DOCUMENTS_A_BATCH = 64  # as in ngpt.data.stream
# Each window is read while the one before it is tokenised: in a single pass over little text, the reading of a second one would count.
_PASSES = 3
_SEQ_LEN, _MICRO_BATCH, _GLOBAL_BATCH = 256, 16, 512


def bare_encode(texts: list[str], tokenizer: Tokenizer) -> Callable[[], tuple[int, float]]:
    """A measurement of `encode` alone: (tokens, seconds)."""

    def measure() -> tuple[int, float]:
        began, tokens = time.perf_counter(), 0
        for first in [*range(0, len(texts), _DOCUMENTS_A_BATCH)] * _PASSES:
            tokens += sum(map(len, tokenizer.encode(texts[first : first + _DOCUMENTS_A_BATCH])))
        return tokens, time.perf_counter() - began

    return measure


def streamed(data: DataConfig, tokenizer: Tokenizer, tokens: int) -> Callable[[], tuple[int, float]]:
    """A measurement of a loader from its start, opening and first read included: (tokens of about `tokens`, seconds)."""

    def measure() -> tuple[int, float]:
        began, count = time.perf_counter(), 0
        loader = build_train_loader(
            data,
            tokenizer,
            vocab_size=tokenizer.vocab_size,
            seq_len=_SEQ_LEN,
            micro_batch_size=_MICRO_BATCH,
            global_batch_size=_GLOBAL_BATCH,
            seed=0,
            ranks=Ranks(0, 1, 0),
        )
        while count < tokens:
            count += next(loader).num_label_tokens
        seconds = time.perf_counter() - began
        loader.close()
        return count, seconds

    return measure


def main() -> None:
    """Measure all in turn, `--runs` times, and print median and range."""
    parser = argparse.ArgumentParser(prog="python -m bench.data_throughput", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", nargs="+", required=True, metavar="GLOB", help="text in C4's layout")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a SentencePiece .model file")
    parser.add_argument("--runs", type=int, default=5, help="repetitions (default 5)")
    arguments = parser.parse_args()

    tokenizer = Tokenizer.load(arguments.tokenizer)
    files = expand_globs(arguments.files, option="--files")
    everything = JsonLinesSource(files, [], holdout_every=10**9).open(Share("train"), None, SkippedDocuments(0).tally())
    texts = [document.text for document in everything]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(files, arguments.tokenizer, Path(folder), max_bad_documents=0)
        manifest = job.finish([tokenize_file(file, job.target(index), tokenizer, 0) for index, file in enumerate(files)])
        every_token = _PASSES * manifest.totals()["tokens"]
        hub = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=f"{folder}/cache")
        files_data = LocalC4DataConfig(train_files=files, holdout_every=10**9)
        token_data = TokenizedDataConfig(train_files=[folder])
        measurements = {
            "bare encode": bare_encode(texts, tokenizer),
            "local_c4, pack": streamed(files_data, tokenizer, every_token),
            "c4, pack (local files through datasets)": streamed(C4DataConfig(), tokenizer, every_token),
            "builtin, pack": streamed(BuiltinDataConfig(), tokenizer, 500_000),
            "tokenized, pack": streamed(token_data, tokenizer, 40_000_000),
            "synthetic, pack": streamed(SyntheticDataConfig(), tokenizer, 5_000_000),
        }
        rates: dict[str, list[float]] = {name: [] for name in measurements}
        with mock.patch.object(sources, "open_hub_dataset", return_value=hub):
            for _, (name, measure) in itertools.product(range(arguments.runs), measurements.items()):
                tokens, seconds = measure()
                rates[name].append(tokens / seconds / 1e6)
    ratios = [pipeline / bare for pipeline, bare in zip(rates["local_c4, pack"], rates["bare encode"], strict=True)]

    print(f"{os.cpu_count()} cores, {tokenizer.threads} threads of SentencePiece, {len(texts)} documents, {arguments.runs} runs, in turn")
    print(f"{'million tokens/s':40} {'median':>8} {'lowest':>8} {'highest':>8}")
    for name, values in [*rates.items(), ("local_c4 / bare encode", ratios)]:
        print(f"{name:40} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f}")


if __name__ == "__main__":
    main()
