"""Faults of Weights & Biases, shown with real `wandb` online, and a server on the loopback interface: `fault | expected` in docstrings."""

from __future__ import annotations

import contextlib
import importlib.util
import struct
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from ngpt.run import Run
from ngpt.telemetry import sinks

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.slow
SHORT = ["trainer.max_steps=4", "eval.every_steps=0", "eval.at_end=false", "logger.wandb=online"]
LOGIN_SECONDS, FINISH_SECONDS = 4, 2


def load_loopback_wandb() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loopback_wandb", Path(__file__).with_name("loopback_wandb.py"))
    module = sys.modules["loopback_wandb"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loopback_wandb = load_loopback_wandb()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """`serve(behaviour)`: a server that `wandb` takes for W&B's own."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    # Its own measurements of itself wait for the server at exit; they are no part of what is tested.
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    sinks._within(10, wandb.teardown)
    opened = []

    def start(behaviour="well"):
        opened.append(loopback_wandb.LoopbackWandb(behaviour))
        monkeypatch.setenv("WANDB_BASE_URL", opened[-1].url)
        return opened[-1]

    yield start
    for server in opened:
        server.close()
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb-"):
            child.kill()
    for _ in range(2):  # the first time it stumbles over its own process, and forgets to log out
        with contextlib.suppress(Exception):
            sinks._within(10, wandb.teardown)


def transactions(folder):
    """What `wandb` wrote for `wandb sync`: the records of a .wandb file, which is a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    with contextlib.suppress(Exception):
        sinks._within(20, wandb.teardown)  # as at the exit of the process: what was begun is written
    (path,) = folder.glob("run-*.wandb")
    data, records, pending, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pending)
            records.append(record)
            pending = b""
    return records


def history(folder):
    """The records that were logged, by metric."""
    rows = [record.history.item for record in transactions(folder) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): float(item.value_json) for item in row if item.value_json[0] not in '"{['} for row in rows
    ]


def warnings_of_wandb(tiny):
    return [line for line in tiny.log().splitlines() if "W&B could not" in line or "no API key" in line]


@pytest.mark.parametrize("fault", ["refused", "silent", "refuses"])
def test_a_server_that_cannot_be_used_costs_seconds_and_nothing_else(serve, tiny, monkeypatch, fault, record_property):
    """W&B refuses connections, takes them and never answers, or rejects the key (401) | one warning, logged offline, exit code 0; all
    records in metrics.jsonl and in the offline run; no more than logger's time limits lost; `wandb sync` named at the end
    """
    monkeypatch.setattr(sinks, "_LOGIN_SECONDS", LOGIN_SECONDS)
    server = serve("well" if fault == "refused" else fault)
    if fault == "refused":
        server.close()
    assert (
        tiny.run("trainer.max_steps=1", "eval.every_steps=0", "eval.at_end=false", "scheduler.warmup_steps=0", "run.name=warm") == 0
    )  # imports
    started = time.monotonic()
    assert tiny.run(*SHORT) == 0
    lost = time.monotonic() - started
    assert lost < LOGIN_SECONDS + FINISH_SECONDS + 20, "start of W&B's own process, twice, on a busy machine"
    assert [record["step"] for record in tiny.records()] == [1, 2, 3, 4]
    assert len(warnings_of_wandb(tiny)) == 1
    assert "logging offline" in warnings_of_wandb(tiny)[0]
    (folder,) = (tiny.folder / "wandb").glob("offline-run-*")
    assert [row["step"] for row in history(folder)] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in history(folder)] == [record["train/loss"] for record in tiny.records()]
    assert f"wandb sync {folder}" in tiny.log()
    record_property("seen", f"{warnings_of_wandb(tiny)[0][24:100]}...; {lost:.0f} s in all")


def test_a_server_that_goes_away_in_mid_run_ends_in_a_note_not_in_a_wait(serve, tiny, monkeypatch, record_property):
    """W&B's server goes away after the run was opened there | training is not held up; the end waits for its time limit, names the
    folder to upload, exit code 0
    """
    monkeypatch.setattr(sinks, "_FINISH_SECONDS", FINISH_SECONDS)
    server = serve()
    record = Run.record

    def close_after_two(self, result):
        record(self, result)
        if result.step == 2:
            assert server.run_is_open.wait(20)
            server.close()

    monkeypatch.setattr(Run, "record", close_after_two)
    started = time.monotonic()
    assert tiny.run(*SHORT) == 0
    assert time.monotonic() - started < FINISH_SECONDS + 30
    assert [record["step"] for record in tiny.records()] == [1, 2, 3, 4]
    assert all(record["time/step_s"] < 2 for record in tiny.records()[1:])
    assert len(warnings_of_wandb(tiny)) == 1
    (folder,) = (tiny.folder / "wandb").glob("run-*")
    assert f"wandb sync {folder}" in tiny.log()
    assert [row["step"] for row in history(folder)] == [1, 2, 3, 4]
    record_property("seen", warnings_of_wandb(tiny)[0][24:120])


def test_wandbs_own_process_killed_in_mid_run_is_replaced(serve, tiny, monkeypatch, record_property):
    """kill -9 of wandb-core, the process that uploads, in mid-run | one warning, the rest logged offline under the same id, exit code 0"""
    serve()
    record = Run.record

    def kill_after_two(self, result):
        record(self, result)
        if result.step == 2:
            for child in psutil.Process().children(recursive=True):
                if child.name() == "wandb-core":
                    child.kill()
            time.sleep(0.5)

    monkeypatch.setattr(Run, "record", kill_after_two)
    assert tiny.run(*SHORT) == 0
    assert [record["step"] for record in tiny.records()] == [1, 2, 3, 4]
    assert len(warnings_of_wandb(tiny)) == 1
    online, offline = sorted((tiny.folder / "wandb").glob("*run-2*"), key=lambda path: path.name.startswith("offline"))
    assert online.name.rpartition("-")[2] == offline.name.rpartition("-")[2], "the run's id"
    assert {row["step"] for row in history(offline)} >= {4}
    assert f"wandb sync {online} {offline}" in tiny.log()
    record_property("seen", warnings_of_wandb(tiny)[0][24:120])


def test_a_resumed_run_continues_the_same_run_of_wandb_with_step_as_its_axis(serve, tiny):
    """A run that was resumed, W&B online | the same W&B run, every step once, `step` the x axis of all metrics; nothing to upload"""
    server = serve()
    assert tiny.run(*SHORT) == 0
    assert tiny.run(*SHORT, "trainer.max_steps=6") == 0
    (run,) = set(server.runs)
    assert [row["step"] for row in server.history[run]] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in server.history[run]] == [record["train/loss"] for record in tiny.records()]
    assert warnings_of_wandb(tiny) == []
    assert "wandb sync" not in tiny.log()
    for folder in (tiny.folder / "wandb").glob("run-*"):
        metrics = [record.metric for record in transactions(folder) if record.WhichOneof("record_type") == "metric"]
        assert any(metric.name == "step" for metric in metrics)
        assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
