"""Records have the names and units that the pages promise, and only numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ngpt.config.durations import clock
from ngpt.engine.base import UpdateOutcome
from ngpt.loop.evaluate import EvalResult
from ngpt.loop.train_step import StepResult
from ngpt.telemetry.console import eval_line, progress_bar, step_line
from ngpt.telemetry.metrics import GIB, StepMetrics, device_memory, device_peak_flops, eval_record


def result(step=1, *, loss=2.0, grad_norm=0.5, step_seconds=0.5):
    update = UpdateOutcome(loss, grad_norm, grad_norm / 2, lr=1e-3, applied=True, skipped_matrices=0, gradient_bytes=GIB // 2)
    return StepResult(step, 100 * step, 100, update, skipped_steps=0, step_seconds=step_seconds, data_seconds=0.1, batches=[])


def record_of(metrics, step_result, communication=None):
    return metrics.record(
        step_result,
        state_bytes={"weights": GIB, "optimizer_state": 3 * GIB, "moments": 2 * GIB, "basis": GIB},
        memory={"allocated": GIB, "peak_allocated": 2 * GIB, "peak_reserved": 3 * GIB},
        sources={"bad_documents": 4},
        communication=communication or {},
    )


@pytest.fixture
def metrics():
    return StepMetrics(flops_per_token=10.0, peak_flops=8000.0, world_size=2)


def test_the_promised_names_and_units(metrics):
    metrics.add(result())
    record = record_of(metrics, result())
    assert record == {
        "step": 1,
        "tokens": 100,
        "train/loss": 2.0,
        "train/perplexity": pytest.approx(math.exp(2)),
        "optim/lr": 1e-3,
        "optim/grad_norm": 0.5,
        "optim/applied_grad_norm": 0.25,
        "train/loss_spikes": 0,
        "train/rollbacks": 0,
        "optim/skipped_steps": 0,
        "throughput/tokens_per_sec": 200.0,
        "throughput/tokens_per_sec_per_device": 100.0,
        "throughput/mfu": pytest.approx(100 * 10 / 8000),
        "time/step_s": 0.5,
        "time/data_s": 0.1,
        "memory/weights_gib": 1.0,
        "memory/gradients_gib": 0.5,
        "memory/optimizer_state_gib": 3.0,
        "memory/optimizer_moments_gib": 2.0,
        "memory/optimizer_basis_gib": 1.0,
        "memory/allocated_gib": 1.0,
        "memory/peak_allocated_gib": 2.0,
        "memory/peak_reserved_gib": 3.0,
        "data/bad_documents": 4,
    }


def test_rates_are_means_over_the_steps_since_the_last_record(metrics):
    metrics.add(result(1, step_seconds=3.0))
    metrics.add(result(2, step_seconds=1.0))
    assert record_of(metrics, result(2))["throughput/tokens_per_sec"] == pytest.approx(200 / 4)
    metrics.add(result(3, step_seconds=0.5))
    assert record_of(metrics, result(3))["throughput/tokens_per_sec"] == pytest.approx(200)


def test_what_is_not_finite_becomes_null_so_that_every_line_is_json(metrics):
    bad = result(loss=math.nan, grad_norm=math.inf)
    metrics.add(bad)
    record = record_of(metrics, bad)
    assert record["train/loss"] is None
    assert record["train/perplexity"] is None
    assert record["optim/grad_norm"] is None
    json.dumps(record, allow_nan=False)
    assert "loss     nan" in step_line(record, total_steps=10, seconds_left=0)


def test_eval_record_leaves_out_bits_per_byte_where_bytes_are_unknown():
    known = eval_record(3, 30, EvalResult(2.0, 1.5, 10, 20), seconds=1.0)
    assert known["val/bits_per_byte"] == pytest.approx(2.0 * 10 / math.log(2) / 20)
    assert known["val/perplexity_galore_protocol"] == pytest.approx(math.exp(1.5))
    assert "val/bits_per_byte" not in eval_record(3, 30, EvalResult(2.0, 1.5, 10, 0), seconds=1.0)
    assert "val ppl 7.39 (galore protocol 4.48) | 1.4427 bits/byte | 10 tokens in 1.0s" in eval_line(known, total_steps=5)


def test_the_console_line_is_the_documented_one_and_always_as_wide(metrics):
    metrics.add(result())
    first = step_line(record_of(metrics, result()), total_steps=10_000, seconds_left=5025.0)
    assert first == (
        "step     1/10000 (  0.0%) | loss  2.0000 | ppl      7.4 | lr 1.00e-03 | gnorm   0.50 | mem 2.00GiB | "
        "tok/s       200 | mfu 12.5% | eta 1:23:45"
    )
    late = result(10_000, loss=10.25, grad_norm=123.4)
    metrics.add(late)
    assert len(step_line(record_of(metrics, late), total_steps=10_000, seconds_left=0)) == len(first)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360000, "100:00:00"), (-3, "0:00:00")]
)
def test_duration(seconds, text):
    assert clock(seconds) == text


def test_resident_set_on_a_cpu_is_plausible():
    memory = device_memory(torch.device("cpu"))
    assert 2**20 < memory["allocated"] <= memory["peak_allocated"] * 1.05 < 2**40


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA L4", 121e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_peaks_of_known_gpus_go_by_whole_words_of_their_names(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert device_peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_measured_peak_is_plausible():
    assert 1e8 < device_peak_flops(torch.device("cpu"), torch.float32) < 1e14


def test_the_progress_bar_shows_on_a_terminal_only(capsys, monkeypatch):
    with progress_bar(total_steps=3, done=1) as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with progress_bar(total_steps=3, done=1) as bar:
        bar.update()
    assert "1/3" in capsys.readouterr().out


def test_bytes_on_the_wire_are_those_of_one_step(metrics):
    metrics.add(result(1))
    metrics.add(result(2))
    record = record_of(metrics, result(2), {"updates": 300, "weights": 100})
    assert record["comm/bytes_per_step"] == 200
    assert record["comm/weights_bytes_per_step"] == 50
    metrics.add(result(3))
    assert not [name for name in record_of(metrics, result(3)) if name.startswith("comm/")]
