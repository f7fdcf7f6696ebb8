"""The manifest tells every start and no secret; the plot is a picture of the metrics."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from ngpt.config.redaction import redact_argument
from ngpt.telemetry.manifest import git_state, write_manifest
from ngpt.telemetry.plot import plot_run


def write(path, **changes):
    values = {"config": {"seed": 1}, "device": torch.device("cpu"), "argv": ["seed=1"], "resumed_from": None} | changes
    write_manifest(path, **values)
    return json.loads(path.read_text())["starts"]


def test_every_start_of_a_run_is_kept(tmp_path):
    path = tmp_path / "manifest.json"
    write(path)
    starts = write(path, resumed_from="step-0000100", argv=["seed=1", "trainer.max_steps=9"])
    assert [start["resumed_from"] for start in starts] == [None, "step-0000100"]
    assert starts[1]["argv"] == ["seed=1", "trainer.max_steps=9"]
    assert starts[0]["config"] == {"seed": 1}
    assert torch.__version__.startswith(starts[0]["versions"]["torch"])  # which may lack the local part, +cu130
    assert "cpu" in starts[0]["device"]


def test_a_manifest_that_was_cut_off_does_not_stop_a_run(tmp_path):
    """manifest.json of the run was cut off | the run starts all the same"""
    path = tmp_path / "manifest.json"
    path.write_text('{"starts": [{"tim')
    assert len(write(path)) == 1


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("logger.api_key=abc123", "logger.api_key=***"),
        ("hf_token=abc", "hf_token=***"),
        ("data.train_files=https://user:pa55@example.org/x", "data.train_files=https://***@example.org/x"),
        ("trainer.max_tokens=100", "trainer.max_tokens=100"),
        ("tokenizer.path=a.model", "tokenizer.path=a.model"),
    ],
)
def test_secrets_are_not_written(argument, shown):
    assert redact_argument(argument) == shown


def test_git_state_knows_a_modified_checkout_and_what_an_image_was_built_from(tmp_path, monkeypatch):
    monkeypatch.delenv("NGPT_COMMIT", raising=False)
    assert git_state(tmp_path) is None
    monkeypatch.setenv("NGPT_COMMIT", "abc")
    assert git_state(tmp_path) == {"commit": "abc", "modified": None}
    commands = (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"])
    (tmp_path / "file").write_text("1")
    for command in commands:
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = git_state(tmp_path)
    (tmp_path / "file").write_text("2")
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert not clean["modified"]
    assert git_state(tmp_path) == {"commit": clean["commit"], "modified": True}


def test_the_plot_is_a_png_even_of_a_run_without_evaluation_or_with_holes(tmp_path):
    records = [
        {"step": 1, "tokens": 10, "train/loss": 3.0, "train/perplexity": 20.1, "memory/weights_gib": 0.1},
        {"step": 2, "tokens": 20, "train/loss": None, "train/perplexity": None, "memory/weights_gib": 0.1},
    ]
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "metrics.png"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_run(metrics, picture, title="run", references={"unigram": 500.0})
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    metrics.write_text("")
    plot_run(metrics, picture, title="empty")
