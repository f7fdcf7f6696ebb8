"""The launch scripts hand their arguments to the trainer as they are, and a SLURM job comes back only when its run is unfinished."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for path in (REPOSITORY / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
OVERRIDES = ["experiment=quickstart", "data.train_files=[a b/*.gz]"]  # a space, and a pattern that a shell would expand

TINY = [
    "model=llama_9m",
    "model.vocab_size=128",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data=synthetic",
    "optimizer=galore",
    "optimizer.rank=8",
    "trainer.seq_len=32",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.precision=fp32",
    "trainer.peak_flops=1e9",
    "scheduler.warmup_steps=1",
    "eval.max_tokens=300",
    "eval.every_steps=0",
    "checkpoint.every_steps=0",
    "logger.every_steps=1",
    "run.name=tiny",
]


def stub(folder: Path, name: str, body: str) -> Path:
    """A command of that name which runs `body`, for a test to put in the place of the real one."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script whose PYTHON, docker, srun and scontrol are the stubs of `folder`."""
    settings = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")} | environment
    command = ["bash", str(REPOSITORY / "launch" / script), *OVERRIDES]
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False, cwd=folder)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_short_and_ends_in_the_trainer(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    assert "set -euo pipefail" in lines
    assert lines[-1].endswith(('-m ngpt.train "$@"', '--module ngpt.train "$@"'))
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize("script", ["one_gpu.sh", "torchrun.sh", "deepspeed.sh", "multi_node.sh"])
def test_arguments_reach_the_trainer_untouched(script: str, tmp_path: Path) -> None:
    stub(tmp_path, "python", 'printf "%s\\n" "$@"')
    done = run(script, tmp_path, HEAD="here", NNODES="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["ngpt.train", *OVERRIDES]


def test_the_container_gets_the_arguments_and_no_secret_on_its_command_line(tmp_path: Path) -> None:
    stub(tmp_path, "docker", 'printf "%s\\n" "$@"')
    done = run("docker.sh", tmp_path, WANDB_API_KEY="secret", DATA="/some where")
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed[-5:] == ["python", "-m", "ngpt.train", *OVERRIDES]
    assert "/some where:/data:ro" in printed
    assert "secret" not in done.stdout


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (4, True), (137, True), (0, False), (1, False), (2, False)])
def test_a_slurm_job_is_queued_again_only_when_the_trainer_can_continue(code: int, requeued: bool, tmp_path: Path) -> None:
    """A SLURM job ends with 75, 4, 137, 0, 1 or 2 | queued again after the first three only"""
    stub(tmp_path, "srun", f'printf "%s\\n" "$@"; exit {code}')
    stub(tmp_path, "scontrol", 'echo "scontrol $*"')
    done = run("slurm.sbatch", tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    assert done.returncode == code
    printed = done.stdout.splitlines()
    assert printed[2:6] == ["-m", "ngpt.train", *OVERRIDES]
    assert ("scontrol requeue 7" in printed) == requeued


def test_a_slurm_job_whose_tasks_die_is_not_queued_for_ever(tmp_path: Path) -> None:
    """A SLURM job whose tasks die every time | not queued for ever"""
    stub(tmp_path, "srun", "exit 137")
    stub(tmp_path, "scontrol", 'echo "scontrol $*"')
    done = run("slurm.sbatch", tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7", SLURM_RESTART_COUNT="10")
    assert "scontrol" not in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", "--shell=bash", *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_the_same_command_continues(tmp_path: Path) -> None:
    """kill -9 of rank 1 under torchrun | named once; the same command continues from the newest checkpoint"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ngpt.train"]
    settings = [*TINY, f"run.dir={tmp_path}", "engine.timeout_seconds=20", "checkpoint.every_steps=5"]
    with subprocess.Popen(
        [*launch, *settings, "trainer.max_steps=100000"], stdout=PIPE, stderr=STDOUT, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step      8/"))
        ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
        ranks[0].kill()
        said = process.stdout.read()
    assert said.count("rank 1 died or was stopped: no sign of life") == 1
    assert process.returncode != 0
    saved = max(int(path.name.partition("-")[2]) for path in (tmp_path / "tiny/checkpoints").glob("step-*"))
    done = subprocess.run(
        [*launch, *settings, f"trainer.max_steps={saved + 2}"], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert f"continuing from {tmp_path}/tiny/checkpoints/step-{saved:07d}" in done.stdout
    assert f"done: step {saved + 2}" in done.stdout


@pytest.mark.slow
def test_a_signal_to_one_rank_under_deepspeeds_launcher_saves_and_exits_with_75(tmp_path: Path) -> None:
    """SIGTERM to one rank under DeepSpeed's launcher | all save; the launch exits with 75"""
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "none", "--num_accelerators", "2", "--module", "ngpt.train"]
    settings = [*TINY, f"run.dir={tmp_path}", "trainer.max_steps=100000"]
    with subprocess.Popen([*launch, *settings], stdout=PIPE, stderr=STDOUT, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step      3/"))
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == "1"]
        ranks[0].terminate()
        said = process.stdout.read()
    assert "SIGTERM on another rank: saving, then exiting" in said
    assert "stopped by SIGTERM" in said
    assert process.returncode == 75
    assert len(list((tmp_path / "tiny/checkpoints").glob("step-*/optimizer-*"))) == 2
