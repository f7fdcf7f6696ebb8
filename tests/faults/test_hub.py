"""Faults of the hub, injected into real HTTP answers of a server on the loopback interface: `fault | expected` in each docstring.

The real `datasets` and `huggingface_hub` do the reading, and HF_ENDPOINT is all that tells them from a run against the real hub. What they
cannot be shown here is TLS, and Xet, the transfer protocol that they use for downloads of whole files but not for streaming.
"""

from __future__ import annotations

import importlib.util
import io
import os
import random
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece
import torch

from ngpt.data import hub_client
from ngpt.data.documents import DataError, Share, SkippedDocuments
from ngpt.data.hub import HubSource, Retries, open_hub_dataset

datasets = pytest.importorskip("datasets")
REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["river", "mountain", "copper", "lantern", "whistle", "garden", "orbit", "thunder", "velvet", "marble", "signal", "harbor"]
ALWAYS = float("inf")


def load_loopback_hub() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).with_name("loopback_hub.py"))
    module = sys.modules["loopback_hub"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loopback_hub = load_loopback_hub()
Fault = loopback_hub.Fault


def documents(shard, count, words):
    generator = random.Random(shard)
    return [f"shard {shard} row {row} " + " ".join(generator.choices(WORDS, k=words)) for row in range(count)]


def train_file(shard):
    return f"en/c4-train.{shard:05d}-of-00512.json.gz"


@pytest.fixture(scope="module")
def files():
    """Three shards of 60 documents each, and the held-out one."""
    shards = {train_file(shard): loopback_hub.shard(documents(shard, 60, 12)) for shard in range(3)}
    return shards | {"en/c4-validation.00000-of-00008.json.gz": loopback_hub.shard(documents(9, 30, 12))}


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """`serve(files)`: a hub that the libraries of this process take for the real one."""
    import fsspec
    import huggingface_hub

    opened = []

    def start(files):
        hub = loopback_hub.LoopbackHub(files)
        opened.append(hub)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(huggingface_hub.constants.ENDPOINT, hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        # Several requests for a file of some KB, as for one of 300 MB. Not below what tells gzip from other formats.
        monkeypatch.setattr(fsspec.spec.AbstractBufferedFile, "DEFAULT_BLOCK_SIZE", 8192)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return hub

    yield start
    for hub in opened:
        hub.close()


@pytest.fixture
def hub(serve, files):
    return serve(files)


def open_source(retries):
    open_split = partial(open_hub_dataset, loopback_hub.REPOSITORY, "en", loopback_hub.COMMIT)
    return HubSource(open_split, {"train": "train", "eval": "validation"}, name="c4", retries=retries)


def read(source, state=None):
    reader = source.open(Share("train"), state, SkippedDocuments(0).tally())
    return [document.text for document in reader]


EXPECTED = [text for shard in range(3) for text in documents(shard, 60, 12)]
FAULTS = {
    "every answer is slow": (Fault("", "slow", 0.03, times=ALWAYS), 0),
    "429 for the list of files": (Fault("/tree/", "status", 429, times=2), 2),
    "503 for the list of files": (Fault("/revision/", "status", 503, times=2), 2),
    "no answer for the list of files": (Fault("/tree/", "silent", 60), 1),
    "429 in a shard": (Fault("^/cdn/.*00001", "status", 429, times=2), 2),
    "500 in a shard": (Fault("resolve.*train.00002", "status", 500, times=3), 3),
    "504 in a shard": (Fault("^/cdn/.*00002", "status", 504), 1),
    "connection dropped in a shard": (Fault("^/cdn/.*00001", "drop", 0.5, times=2), 2),
    "connection dropped before an answer": (Fault("^/cdn/.*00001", "drop", 0.0), 1),
    "no answer for a shard": (Fault("^/cdn/.*00001", "silent", 60), 1),
    "garbage in place of a shard": (Fault("^/cdn/.*00002", "garbage", times=2), 2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_loses_and_repeats_nothing(hub, monkeypatch, name, record_property):
    """The hub is slow, busy (429, 500, 503, 504), silent, drops connections, or sends garbage, a few times | retried and counted; the
    same documents in the same order
    """
    import huggingface_hub

    monkeypatch.setattr(hub_client, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    fault, expected_retries = FAULTS[name]
    hub.faults.append(Fault(**vars(fault)))
    retries = Retries(4, 0.01)
    started = time.monotonic()
    assert read(open_source(retries)) == EXPECTED
    assert time.monotonic() - started < 30, "a silent server has to be given up"
    assert retries.count == expected_retries
    record_property("seen", f"{name}: {retries.count} retries, {len(EXPECTED)} documents in order")


def test_a_connection_dropped_in_the_middle_of_a_long_shard_goes_on_where_the_last_document_was_read(serve):
    """Connection dropped twice in the middle of a shard, after documents of it were used | on from the next document, nothing again"""
    generator = random.Random(0)
    texts = [f"row {row} {generator.randbytes(1700).hex()}" for row in range(3500)]  # more than the 10 MB that are read at a time
    hub = serve({train_file(0): loopback_hub.shard(texts), "en/c4-validation.00000-of-00008.json.gz": loopback_hub.shard(["x"])})
    source = open_source(retries := Retries(4, 0.01))
    reader = source.open(Share("train"), None, SkippedDocuments(0).tally())
    found = [next(reader).text for _ in range(100)]
    hub.faults.append(Fault("^/cdn/", "drop", 0.5, times=2))
    found += [document.text for document in reader]
    assert found == texts
    assert retries.count == 2


def test_the_hub_is_left_alone_for_as_long_as_it_asks(hub):
    """429 with Retry-After: 1, and with the hub's own ratelimit header | the next request comes no sooner"""
    hub.faults += [
        Fault("^/cdn/.*00001", "status", 429, headers={"Retry-After": "1"}),
        Fault("^/cdn/.*00002", "status", 429, headers={"ratelimit": '"api";r=0;t=1'}),
    ]
    source = open_source(Retries(4, 0.0))
    source.num_shards("train")
    started = time.monotonic()
    assert read(source) == EXPECTED
    assert 2.0 <= time.monotonic() - started < 6


def test_a_wait_that_the_hub_asks_for_has_a_limit():
    """Retry-After of a year, or one that is no number | ten minutes at most; the usual wait"""
    assert hub_client.seconds_asked(429, {"retry-after": "31536000"}) == 600
    assert hub_client.seconds_asked(503, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 0
    assert hub_client.seconds_asked(503, {"ratelimit": '"api";r=0;t=55'}) == 0


def test_a_hub_that_restarts_in_mid_stream_is_waited_for(hub):
    """The hub refuses connections for a second while the run reads | retried until it is back; nothing lost"""
    retries = Retries(8, 0.1)
    source = open_source(retries)
    reader = source.open(Share("train"), None, SkippedDocuments(0).tally())
    found = [next(reader).text for _ in range(10)]
    hub.close()
    threading.Timer(1.0, hub.open).start()
    found += [document.text for document in reader]
    assert found == EXPECTED
    assert retries.count >= 1


@pytest.mark.parametrize(
    ("fault", "message", "retried"),
    [
        (Fault("", "status", 503, times=ALWAYS), "503 Service Unavailable", 5),
        (Fault("", "silent", 60, times=ALWAYS), "ReadTimeout", 3),  # as where there is no network: no use in waiting for long
        (Fault("/tree/", "garbage", times=ALWAYS), "cannot be opened", 0),
        (Fault("", "status", 404, times=ALWAYS), "cannot be opened", 0),
    ],
    ids=["503", "silence", "garbage", "404"],
)
def test_a_hub_that_does_not_come_back_is_a_clear_error_at_the_start(hub, monkeypatch, fault, message, retried):
    """The hub is busy, silent, sends garbage or knows nothing of the data, for ever, at the start | one error that says what to do"""
    import huggingface_hub

    monkeypatch.setattr(hub_client, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.faults.append(Fault(**vars(fault)))
    retries = Retries(5, 0.01)
    with pytest.raises(DataError, match=message) as caught:
        open_source(retries).num_shards("train")
    assert retries.count == retried
    assert "data=local_c4" in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    model = io.BytesIO()
    texts = (text for shard in range(2) for text in documents(shard, 60, 12))
    options = {"vocab_size": 110, "hard_vocab_limit": False, "model_type": "unigram", "minloglevel": 2}
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options, **ids)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def c4(tokenizer_file, tiny):
    """Overrides of a run on the hub's C4: about two steps a shard. The settings of `tiny` are then without its own data."""
    before = tiny.settings[:]
    tiny.settings[:] = [setting for setting in before if not setting.startswith("data")]
    numbers = ["data.streams=1", "data.shuffle_window=8", "data.prefetch_batches=1", "data.max_retries=3", "data.retry_seconds=0.02"]
    yield ["data=c4", f"tokenizer.path={tokenizer_file}", *numbers, "eval.max_tokens=200"]
    tiny.settings[:] = before


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(records):
    return [record["train/loss"] for record in records]


def test_a_run_through_faults_of_the_hub_is_the_run_without_them(hub, tiny, c4, tmp_path, record_property):
    """429, 503, dropped connections and garbage during a run on data=c4 | the losses and weights of the undisturbed run; data/retries"""
    assert tiny.run(*c4, folder=tmp_path / "straight") == 0
    assert {record["data/retries"] for record in tiny.records(tmp_path / "straight")} == {0}
    hub.faults += [
        Fault("^/cdn/.*train.00001", "drop", 0.5, times=2),
        Fault("^/cdn/.*train.00002", "garbage"),
        Fault("^/cdn/.*train.00002", "status", 503),
        Fault("resolve.*train.00002", "status", 429),
    ]
    assert tiny.run(*c4, folder=tmp_path / "disturbed") == 0
    assert losses(tiny.records(tmp_path / "disturbed")) == losses(tiny.records(tmp_path / "straight"))
    assert same(tiny.weights(8, tmp_path / "disturbed"), tiny.weights(8, tmp_path / "straight"))
    assert tiny.records(tmp_path / "disturbed")[-1]["data/retries"] == 5
    record_property("seen", f"{tiny.records(tmp_path / 'disturbed')[-1]['data/retries']} retries, losses and weights bit-equal")


@pytest.mark.slow
def test_the_command_saves_when_the_hub_is_gone_and_continues_exactly_when_it_is_back(hub, tiny, c4, tmp_path, record_property):
    """`python -m ngpt.train data=c4`, a hub that drops, is busy, then answers 503 for ever | exit code 69 and one clear message, a
    checkpoint of the last finished step; with the hub back the same command ends with the bits of the undisturbed run
    """
    assert tiny.run(*c4, folder=tmp_path / "straight") == 0
    hub.faults += [
        Fault("/tree/", "status", 503),
        Fault("^/cdn/.*train.00001", "drop", 0.5),
        Fault("^/cdn/.*train.00002", "status", 503, times=ALWAYS),
    ]
    folder = tmp_path / "broken"
    homes = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-m", "ngpt.train", *tiny.settings, *c4, f"run.dir={folder}"]
    done = subprocess.run(command, env=os.environ | homes, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 69, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "503 Service Unavailable" in done.stderr
    assert "(retried 3 times)" in done.stderr
    assert "HTTP Request" not in done.stdout + done.stderr, "the library's own log"
    latest = int((folder / "tiny/checkpoints/latest").read_text().removeprefix("step-"))
    assert 1 <= latest < 8
    assert tiny.records(folder)[-1]["step"] == latest
    hub.faults.clear()
    assert tiny.run(*c4, folder=folder) == 0
    assert losses(tiny.records(folder)) == losses(tiny.records(tmp_path / "straight"))
    assert same(tiny.weights(8, folder), tiny.weights(8, tmp_path / "straight"))
    record_property("seen", f"exit code 69, step {latest} saved; the same command with the hub back ends bit-equal")
