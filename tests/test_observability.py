"""What a run shows of itself on request: statistics of layers, a window of the profiler, a record of the GPU's memory."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ngpt import out_of_memory
from ngpt.config.compose import compose_run
from ngpt.config.validate import ConfigError, validate
from ngpt.telemetry.profiler import ProfilerWindow
from ngpt.train import train

TINY = [
    "model=llama_9m",
    "model.vocab_size=128",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data=synthetic",
    "trainer.seq_len=32",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.max_steps=7",
    "trainer.precision=fp32",
    "trainer.peak_flops=1e9",
    "optimizer.rank=8",
    "optimizer.update_proj_gap=2",
    "eval.every_steps=0",
    "eval.at_end=false",
    "logger.every_steps=7",
]
CPU = torch.device("cpu")


def run_in(folder: Path, *overrides: str) -> None:
    arguments = [*TINY, f"run.dir={folder}", *overrides]
    assert train(compose_run(arguments), arguments) == 0


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with statistics and a profile."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ngpt.telemetry.plot.plot_run", lambda *_, **__: None)
        run_in(folder, "run.name=watched", "logger.statistics_every=3", "trainer.profile_at=2", "trainer.profile_steps=2")
        run_in(folder, "run.name=plain")
    return folder / "watched"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------- statistics
def test_statistics_have_a_record_of_their_own_every_so_many_steps(watched):
    of_layers = [record for record in records(watched) if "subspace/rank" in record]
    assert [record["step"] for record in of_layers] == [3, 6]
    assert all("train/loss" not in record and record["tokens"] > 0 for record in of_layers)
    last = of_layers[-1]
    assert {"subspace/captured_energy", "subspace/overlap", "subspace/rank"} <= last.keys()
    names = {name.removeprefix("layers/").rpartition("/")[0] for name in last if name.startswith("layers/")}
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"} <= names
    figures = {name.rpartition("/")[2] for name in last if "down_proj" in name}
    assert figures == {"gradient_rms", "projected_gradient_rms", "update_rms", "weight_rms", "captured_energy", "overlap", "rank"}


def test_who_does_not_ask_for_statistics_has_none(watched):
    assert not [name for record in records(watched.parent / "plain") for name in record if name.startswith(("layers/", "subspace/"))]


def test_watching_and_profiling_change_no_weight(watched):
    ours, theirs = (load_file(run / "checkpoints/step-0000007/model.safetensors") for run in (watched, watched.parent / "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------------------------ profile
def test_a_profile_is_a_trace_that_names_what_the_run_was_doing(watched):
    with gzip.open(watched / "profile/step-2.rank-0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    ranges = [
        event for event in events if event.get("name") in {"data", "forward+backward", "update"} and event.get("cat") == "user_annotation"
    ]
    assert Counter(event["name"] for event in ranges) == {"data": 2, "forward+backward": 4, "update": 2}
    assert all(event["ph"] == "X" and event["dur"] > 0 for event in ranges)
    assert any(event.get("name") == "aten::mm" for event in events)
    assert "forward+backward" in (watched / "profile/step-2.rank-0.txt").read_text()
    log = (watched / "train.log").read_text()
    assert "profile/step-2.rank-0.json.gz (open it in https://ui.perfetto.dev" in log
    assert not (watched.parent / "plain/profile").exists()


def steps_profiled(window: ProfilerWindow, steps: range) -> None:
    for step in steps:
        window.before(step)
        torch.ones(3) @ torch.ones(3)


def test_a_window_that_the_run_ends_in_is_written_all_the_same(tmp_path):
    window = ProfilerWindow(tmp_path / "profile", first=2, steps=5, rank=3, device=CPU)
    steps_profiled(window, range(1, 4))
    assert not (tmp_path / "profile").exists()
    window.close()
    window.close()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"step-2.rank-3.json.gz", "step-2.rank-3.txt"}


def test_a_run_that_resumes_past_its_window_says_so_once(tmp_path, caplog):
    window = ProfilerWindow(tmp_path / "profile", first=2, steps=1, rank=0, device=CPU)
    steps_profiled(window, range(3, 6))
    window.close()
    assert [record.message for record in caplog.records] == [
        "trainer.profile_at = 2: the run is past that step already, so there is no profile"
    ]
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_taken_or_written_costs_a_warning_only(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    window = ProfilerWindow(tmp_path / "file/profile", first=1, steps=1, rank=0, device=CPU)
    steps_profiled(window, range(1, 3))

    def refuse(**_):
        raise RuntimeError("another profiler is running")

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    steps_profiled(ProfilerWindow(tmp_path, first=1, steps=1, rank=0, device=CPU), range(1, 3))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "NotADirectoryError" in caplog.text
    assert "RuntimeError: another profiler is running" in caplog.text


def test_a_window_that_is_not_within_the_run_is_refused():
    with pytest.raises(
        ConfigError, match=r"trainer.profile_at = 6: its 3 steps must be among the 7 of the run; set trainer.profile_at=5, or null"
    ):
        validate(compose_run([*TINY, "trainer.profile_at=6"]), world_size=1)
    validate(compose_run([*TINY, "trainer.profile_at=5"]), world_size=1)


# ----------------------------------------------------------------------------------------------------------------- snapshot
@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What torch's record of CUDA memory is asked for."""
    calls: list[tuple] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: calls.append(("record", enabled)))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: calls.append(("dump", name)))
    return calls


def test_running_out_of_memory_leaves_a_snapshot_and_names_it(tmp_path, cuda_calls):
    file = tmp_path / "memory.rank-0.pickle"
    with pytest.raises(out_of_memory.OutOfMemory) as error, out_of_memory.explained(lambda: "too much", snapshot=file):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert f"memory snapshot: {file}, a pickle that https://pytorch.org/memory_viz shows" in str(error.value)
    assert cuda_calls == [("record", "all"), ("dump", str(file)), ("record", None)]


def test_no_snapshot_is_written_where_memory_suffices_and_nothing_recorded_where_nobody_asked(tmp_path, cuda_calls):
    with out_of_memory.explained(lambda: "too much", snapshot=tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match="other"), out_of_memory.explained(lambda: "too much", snapshot=tmp_path / "file"):
        raise ValueError("other")
    assert cuda_calls == [("record", "all"), ("record", None)] * 2
    with pytest.raises(out_of_memory.OutOfMemory), out_of_memory.explained(lambda: "too much"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert len(cuda_calls) == 4


def test_a_snapshot_that_cannot_be_written_does_not_hide_what_happened(tmp_path, cuda_calls, monkeypatch):
    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full_disk)
    with pytest.raises(out_of_memory.OutOfMemory) as error, out_of_memory.explained(lambda: "too much", snapshot=tmp_path / "file"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(error.value).startswith("too much")
    assert "could not be written: No space left" in str(error.value)


def test_a_snapshot_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer.memory_snapshot = true: needs an NVIDIA GPU"):
        run_in(tmp_path, "run.name=none", "trainer.memory_snapshot=true", "trainer.device=cpu")
