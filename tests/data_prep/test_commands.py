"""The commands as a user runs them: train a tokenizer, tokenise, be killed, continue, verify."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import tokenize, train_tokenizer, verify
from ngpt.data.tokenizer import Tokenizer

WORDS = ["river", "mountain", "copper", "lantern", "whistle", "garden", "orbit", "thunder", "velvet", "marble"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for shard in range(4):
        with gzip.open(folder / f"part-{shard}.json.gz", "wt") as out:
            for _ in range(60):
                words = " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, 60)))
                out.write(json.dumps({"text": words + ".\nA second line."}) + "\n")
    return folder


@pytest.fixture
def model(text: Path, tmp_path: Path) -> Path:
    out = tmp_path / "made" / "tokenizer.model"
    assert train_tokenizer.main(["--files", str(text / "*.json.gz"), "--vocab-size", "290", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`data_prep.tokenize` without processes of its own, since starting them takes seconds."""

    def run(job: tokenize.Job, workers: int) -> object:
        model = Tokenizer.load(job.tokenizer_path)
        for index, file in enumerate(job.files):
            if job.finished(index) is None:
                shard = tokenize.tokenize_file(file, job.target(index), model, job.max_bad_documents)
                job.record(index, shard)
                yield index, shard

    monkeypatch.setattr(tokenize, "run", run)
    return lambda text, model, out, *more: tokenize.main(
        ["--files", f"{text}/*.json.gz", "--tokenizer", str(model), "--out", str(out), *more]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_text_gives_the_same_tokenizer(text: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again.model"
    assert train_tokenizer.main(["--files", str(text / "*.json.gz"), "--vocab-size", "290", "--out", str(again)]) == 0
    assert again.read_bytes() == model.read_bytes()
    assert "290 ids, trained on" in capsys.readouterr().out
    tokenizer = Tokenizer.load(model)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 290)
    assert tokenizer.decode(tokenizer.encode(["river\nthunder \N{SNOWMAN}"])[0]) == "river\nthunder \N{SNOWMAN}"


def test_a_vocabulary_too_large_for_the_text_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none.model"
    assert train_tokenizer.main(["--files", str(text / "*.json.gz"), "--vocab-size", "30000", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "--vocab-size=30000" in message
    assert "value <= " in message
    assert not list(tmp_path.glob("*none.model*"))


def test_a_sample_takes_evenly_from_all_files(text: Path) -> None:
    files = sorted(map(str, text.glob("*.json.gz")))
    chosen = list(train_tokenizer.sample_documents(files, 4000, train_tokenizer.SkippedDocuments(0)))
    per_file = [sum(len(d.text) for d in chosen if d.file == file) for file in files]
    assert all(1000 <= size <= 1500 for size in per_file)


def test_shards_hold_the_text_and_pass_verification(
    text: Path, model: Path, tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokens"
    assert run_here(text, model, out) == 0
    assert "of 240 documents" in capsys.readouterr().out
    assert sorted(contents(out)) == ["manifest.json", *(f"shard-{i:05d}.bin" for i in range(4))]
    tokenizer = Tokenizer.load(model)
    with gzip.open(text / "part-2.json.gz", "rt") as lines:
        expected = [t for ids in tokenizer.encode([json.loads(line)["text"] for line in lines]) for t in [*ids, 1]]
    assert np.fromfile(out / "shard-00002.bin", dtype="<u2").tolist() == expected
    assert verify.main([str(out)]) == 0
    record = json.loads((out / "manifest.json").read_text())
    assert record["tokenizer"] == tokenizer.fingerprint
    assert (record["documents"], record["bad_documents"], record["empty_documents"]) == (240, 0, 0)
    assert record["shards"][2]["source"] == "part-2.json.gz"


def test_a_killed_job_continues_to_the_same_bytes(
    text: Path, model: Path, tmp_path: Path, run_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenisation is killed | continues to the same bytes"""
    whole, out = tmp_path / "whole", tmp_path / "tokens"
    assert run_here(text, model, whole) == 0
    original, made = tokenize.tokenize_file, []

    def die_in_the_third(source: str, target: Path, *rest: object) -> object:
        if len(made) == 2:
            (target.parent / f".{target.name}.half").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        made.append(source)
        return original(source, target, *rest)

    monkeypatch.setattr(tokenize, "tokenize_file", die_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_here(text, model, out)
    assert not (out / "manifest.json").exists()
    continued: list[str] = []
    monkeypatch.setattr(tokenize, "tokenize_file", lambda source, *rest: continued.append(source) or original(source, *rest))
    assert run_here(text, model, out) == 0
    assert [Path(source).name for source in continued] == ["part-2.json.gz", "part-3.json.gz"]
    assert contents(out) == contents(whole)


def test_a_finished_shard_of_another_text_or_tokenizer_is_made_again(
    text: Path, model: Path, tmp_path: Path, run_here: Callable[..., int]
) -> None:
    job = tokenize.Job([str(text / "part-0.json.gz")], str(model), tmp_path, max_bad_documents=0)
    job.record(0, tokenize.tokenize_file(job.files[0], job.target(0), Tokenizer.load(model), 0))
    assert job.finished(0) is not None
    with gzip.open(text / "part-0.json.gz", "at") as out:
        out.write('{"text": "one more"}\n')
    assert job.finished(0) is None


def test_a_text_edited_to_the_same_size_is_tokenised_again(text: Path, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "river"}\n')
    job = tokenize.Job([str(source)], str(model), tmp_path, max_bad_documents=0)
    job.record(0, tokenize.tokenize_file(job.files[0], job.target(0), Tokenizer.load(model), 0))
    assert job.finished(0) is not None
    before = source.stat()
    source.write_text('{"text": "orbit"}\n')
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert source.stat().st_size == before.st_size
    assert job.finished(0) is None


def test_a_finished_folder_is_not_overwritten(
    text: Path, model: Path, tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(text, model, tmp_path / "tokens") == 0
    assert run_here(text, model, tmp_path / "tokens") == 2
    assert "finished set of shards already" in capsys.readouterr().err


def test_bad_documents_are_counted_up_to_the_limit(
    text: Path, model: Path, tmp_path: Path, run_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in (1, 3):
        with gzip.open(text / f"part-{shard}.json.gz", "at") as out:
            out.write("broken\n" + json.dumps({"text": ""}) + "\n")
    for _ in range(2):  # once more: every shard is finished by now, and what they skipped still counts
        assert run_here(text, model, tmp_path / "strict", "--max-bad-documents", "1") == 2
        assert "2 bad documents, more than --max-bad-documents=1" in capsys.readouterr().err
    assert not (tmp_path / "strict" / "manifest.json").exists()
    assert run_here(text, model, tmp_path / "patient", "--max-bad-documents", "2") == 0
    assert "skipped: 2 bad documents, 2 empty ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tokens: tokens[:-1], "bytes, but the manifest says"),
        (lambda tokens: np.where(np.arange(len(tokens)) == 5, tokens + 1, tokens), "the checksum is"),
        (lambda tokens: np.where(np.arange(len(tokens)) == 5, 60000, tokens), "token 60000 is outside the vocabulary of 290"),
        (lambda tokens: np.where(np.arange(len(tokens)) == 5, 1, tokens), "documents, the manifest says"),
        (lambda tokens: np.append(tokens[:-1], 7), "not closed by EOS"),
    ],
)
def test_verify_finds_the_damage(
    text: Path,
    model: Path,
    tmp_path: Path,
    run_here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    damage: Callable,
    message: str,
) -> None:
    """Shards damaged in several ways | `data_prep.verify` finds each"""
    out = tmp_path / "tokens"
    assert run_here(text, model, out) == 0
    damaged = damage(np.fromfile(out / "shard-00001.bin", dtype="<u2")).astype("<u2")
    (out / "shard-00001.bin").write_bytes(damaged.tobytes())
    assert verify.main([str(out)]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "shard-00001.bin" in errors


@pytest.mark.slow
def test_processes_of_their_own_write_the_same_shards(
    text: Path, model: Path, tmp_path: Path, run_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_here(text, model, tmp_path / "here") == 0
    monkeypatch.undo()
    arguments = ["--files", f"{text}/*.json.gz", "--tokenizer", str(model), "--out", str(tmp_path / "there"), "--workers", "2"]
    assert tokenize.main(arguments) == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
