"""metrics.jsonl continues exactly; W&B is real in offline mode and never stops a run."""

from __future__ import annotations

import json

import pytest

from ngpt.config.schema import LoggerConfig
from ngpt.telemetry.sinks import JsonlSink, WandbSink


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint_and_a_line_that_was_cut_off(tmp_path):
    """metrics.jsonl has records beyond the checkpoint, and a line cut off by a crash | dropped, so that no step comes twice"""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val/loss": 1.0}\n{"step": 3}\n{"step": 4, "trai')
    sink = JsonlSink(path, resume_step=2)
    sink.write({"step": 3, "train/loss": 0.5})
    sink.close()
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 2, "val/loss": 1.0}, {"step": 3, "train/loss": 0.5}]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    JsonlSink(path, resume_step=0).close()
    assert path.read_text() == ""


def test_a_record_is_readable_at_once(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    sink.write({"step": 1})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1}]
    sink.close()


def make_sink(tmp_path, mode, run_id=None):
    return WandbSink(LoggerConfig(wandb=mode), run_name="r", run_folder=tmp_path, run_config={"seed": 1}, run_id=run_id)


def test_disabled_writes_nothing_and_still_has_an_id_to_keep(tmp_path):
    sink = make_sink(tmp_path, "disabled")
    sink.write({"step": 1})
    sink.close(exit_code=0)
    assert list(tmp_path.iterdir()) == []
    assert len(sink.state_dict()["run_id"]) == 8


@pytest.mark.slow
def test_a_real_offline_run_keeps_its_id_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    first = make_sink(tmp_path, "offline")
    first.write({"step": 1, "tokens": 10, "train/loss": 2.0, "optim/grad_norm": None})
    first.close(exit_code=0)
    second = make_sink(tmp_path, "offline", run_id=first.state_dict()["run_id"])
    second.write({"step": 2, "tokens": 20, "train/loss": 1.0})
    second.close(exit_code=0)
    import wandb

    wandb.teardown()  # as at the exit of the process: on a busy machine the last records reach the file only then
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {path.name for path in files} == {f"run-{first.run_id}.wandb"}
    assert all(b"train/loss" in path.read_bytes() for path in files)


@pytest.mark.slow
def test_online_without_a_key_logs_offline_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sink = make_sink(tmp_path, "online")
    sink.write({"step": 1})
    sink.close(exit_code=0)
    assert "no API key" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_failure_of_wandb_is_logged_once_and_training_goes_on(tmp_path, monkeypatch, caplog, moment):
    """W&B fails at its start, in a log, at its end | one warning; training goes on"""
    import wandb

    class BrokenRun:
        def define_metric(self, *_args, **_kwargs): ...

        def log(self, _record):
            if moment == "log":
                raise RuntimeError("the server is gone")

        def finish(self, **_kwargs):
            if moment == "finish":
                raise RuntimeError("the server is gone")

    def init(**_kwargs):
        if moment == "start":
            raise wandb.errors.CommError("the server is gone")
        return BrokenRun()

    monkeypatch.setattr(wandb, "init", init)
    sink = make_sink(tmp_path, "offline")
    for step in range(3):
        sink.write({"step": step})
    sink.close(exit_code=0)
    assert caplog.text.count("the server is gone") == 1
    assert "training goes on" in caplog.text
