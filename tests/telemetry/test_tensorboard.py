"""TensorBoard's event files have the records of metrics.jsonl, once each, whatever was resumed or rolled back."""

from __future__ import annotations

import importlib.util

import pytest

from ngpt.config.compose import compose_run
from ngpt.config.problems import ConfigError
from ngpt.config.validate import validate
from ngpt.telemetry.tensorboard import TensorBoardSink


def scalars(folder):
    """Everything that TensorBoard would draw: (step, value) by name."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
    )
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def record(step, loss=1.0):
    return {"step": step, "tokens": 10 * step, "train/loss": loss, "optim/grad_norm": None}


def test_records_are_scalars_at_their_own_steps(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    sink = TensorBoardSink(tmp_path, resume_step=0)
    for step in (1, 5, 10):
        sink.write(record(step, loss=1 / step))
    sink.write({"step": 10, "tokens": 100, "val/loss": 0.5})
    sink.close()
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, 1.0), (5, pytest.approx(0.2)), (10, pytest.approx(0.1))]
    assert found["val/loss"] == [(10, 0.5)]
    assert "optim/grad_norm" not in found
    assert "step" not in found


def test_a_resumed_run_draws_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    for resume_step, steps, loss in ((0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5, 6), 2.0)):
        sink = TensorBoardSink(tmp_path, resume_step=resume_step)
        for step in steps:
            sink.write(record(step, loss))
        if resume_step:
            sink.rewind(5)
            sink.write(record(6, 3.0))
        sink.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 3.0)]


def test_a_failure_ends_the_event_files_and_not_the_run(tmp_path, caplog, monkeypatch):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    sink = TensorBoardSink(tmp_path, resume_step=0)

    def full_disk(*_arguments, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(sink._writer), "add_scalar", full_disk)
    for step in (1, 2, 3):
        sink.write(record(step))
    sink.close()
    assert caplog.text.count("No space left on device") == 1
    assert "training goes on" in caplog.text


def test_a_missing_package_is_found_before_anything_is_opened(monkeypatch):
    settings = ["model=llama_9m", "data=synthetic", "optimizer=adamw", "trainer.max_steps=100"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest))
    validate(compose_run(settings))
    with pytest.raises(ConfigError, match=r"logger\.tensorboard = true: needs the package tensorboard.*pip install tensorboard"):
        validate(compose_run([*settings, "logger.tensorboard=true"]))
