"""What the tests of the data room share: a tokenizer, files of documents, and loaders that are closed afterwards."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from ngpt.config.schema import DataConfig
from ngpt.data.loader import build_train_loader
from ngpt.data.tokenizer import Tokenizer
from ngpt.data.train_loader import TrainLoader
from ngpt.dist.ranks import Ranks

WORDS = ["river", "mountain", "copper", "lantern", "whistle", "garden", "orbit", "thunder", "velvet", "marble", "signal", "harbor"]
WORDS += ["willow", "ember", "canyon", "falcon", "meadow", "anchor", "blossom", "cobalt", "drift", "echo", "fable", "glacier"]
VOCAB_SIZE = 300


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words)) + "."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A model in the manner of T5's spiece.model: unigram, pad 0, EOS 1, unknown 2, no BOS (smaller, and with byte fallback)."""
    generator = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(generator, 12) for _ in range(300)]),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five gzip shards of 30, 37, 44, 51 and 58 documents of very different lengths, each with a text that tells where it stands."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(1)
    for shard in range(5):
        with gzip.open(folder / f"part-{shard}.json.gz", "wt") as out:
            for line in range(1, 31 + 7 * shard):
                text = f"shard {shard} line {line} " + sentence(generator, generator.choice([1, 3, 10, 40, 150]))
                out.write(json.dumps({"text": text, "url": "http://example.com", "timestamp": "2020-01-01"}) + "\n")
    return folder


@pytest.fixture
def open_loader(tokenizer: Tokenizer) -> Iterator[Callable[..., TrainLoader]]:
    """`open_loader(config, rank=0, world_size=1, **sizes)`; all loaders are closed at the end of the test."""
    opened = []

    def open_one(data: DataConfig, *, rank: int = 0, world_size: int = 1, **sizes: Any) -> TrainLoader:
        options = {"vocab_size": VOCAB_SIZE, "seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8, "seed": 3} | sizes
        opened.append(build_train_loader(data, tokenizer, ranks=Ranks(rank, world_size, rank), **options))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()
