"""`python -m ngpt.train` as a user meets it: a process of its own, real signals, both launchers, sweeps, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    "trainer.precision=fp32",
    "trainer.peak_flops=1e9",
    "optimizer.rank=8",
    "eval.max_tokens=300",
    "logger.every_steps=1",
    "run.name=tiny",
]
SCRIPTS = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """Ours, without what a launcher around the tests might have set."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_MODE")
    values = {name: value for name, value in os.environ.items() if name not in hidden}
    return values | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return call(folder, sys.executable, "-m", "ngpt.train", *arguments)


def steps(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]


def test_all_mistakes_are_named_at_once_and_before_torch_is_loaded(tmp_path):
    """Several mistakes in the settings | all named in one error, before torch is loaded; exit code 2"""
    began = time.monotonic()
    done = train(tmp_path, *TINY, "trainer.max_stps=4", "optimizer.rank=999", "data.packing=pak", "+optimizer.betta=1")
    assert done.returncode == 2
    for text in ("did you mean trainer.max_steps?", "did you mean data.packing=pack?", "optimizer.betta"):
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 20


def test_the_resolved_configuration_is_shown_without_a_run(tmp_path):
    done = train(tmp_path, *TINY, "trainer.max_steps=4", "--cfg", "job")
    assert done.returncode == 0
    assert "hidden_size: 32" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_mistake_that_shows_only_in_the_files_is_one_message_too(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a tokenizer")
    (tmp_path / "text.jsonl").write_text('{"text": "hello"}\n')
    done = train(tmp_path, *TINY, "data=local_c4", "data.train_files=[text.jsonl]", "tokenizer.path=broken.model", "trainer.max_steps=2")
    assert done.returncode == 2
    assert "broken.model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sigterm_to_a_real_process_saves_exits_with_75_and_the_same_command_continues(tmp_path):
    """SIGTERM to a trainer | saved, exit code 75; the same command goes on"""
    arguments = [*TINY, "trainer.max_steps=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ngpt.train", *arguments], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step  20/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    assert "stopped by SIGTERM" in rest
    stopped_at = steps(tmp_path)[-1]
    assert 20 <= stopped_at < 400
    done = train(tmp_path, *arguments)
    assert done.returncode == 0
    assert f"step {stopped_at}" in done.stdout
    assert steps(tmp_path) == list(range(1, 401))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_usual_launchers_start_one_process(tmp_path, launcher):
    commands = {
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "1", "-m", "ngpt.train"],
        "deepspeed": ["deepspeed", "--num_gpus", "1", "--module", "ngpt.train"],  # appends --local_rank=0, which Hydra would refuse
    }
    done = call(tmp_path, str(SCRIPTS / commands[launcher][0]), *commands[launcher][1:], *TINY, "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert steps(tmp_path) == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.slow
def test_several_processes_are_refused_by_the_engine_for_one_with_the_way_out(tmp_path):
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "ngpt.train"]
    done = call(tmp_path, str(SCRIPTS / command[0]), *command[1:], *TINY, "trainer.max_steps=2", "engine=local")
    assert done.returncode != 0
    assert done.stderr.count("trains on one process") == 1
    assert "set engine=auto" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_every_job_of_a_sweep_has_a_run_folder_of_its_own(tmp_path):
    done = train(tmp_path, "-m", *TINY, "trainer.max_steps=2", "optimizer.lr=0.01,0.02")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    names = {path.name for path in (tmp_path / "runs").iterdir()} - {"sweeps"}
    assert names == {"tiny-optimizer.lr=0.01", "tiny-optimizer.lr=0.02"}
    assert all((tmp_path / "runs" / name / "checkpoints/step-0000002/.complete").exists() for name in names)


@pytest.mark.slow
def test_a_job_that_fails_does_not_keep_the_others_of_a_sweep_from_running(tmp_path):
    """One job of a sweep fails | the others run; the exit code is the worst"""
    done = train(
        tmp_path, "-m", *TINY, "trainer.max_steps=2", "trainer.max_nonfinite_steps=1", "optimizer.lr=1e30,0.01", "scheduler=constant"
    )
    assert done.returncode == 3
    assert "not finite" in done.stderr
    assert (tmp_path / "runs/tiny-optimizer.lr=0.01/checkpoints/step-0000002/.complete").exists()
