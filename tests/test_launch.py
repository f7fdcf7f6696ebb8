"""The launch scripts hand their arguments to the trainer as they are, and a SLURM job comes back only when its run is unfinished."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPOSITORY / "launch").iterdir())
OVERRIDES = ["experiment=quickstart", "data.train_files=[a b/*.gz]"]  # a space, and a pattern that a shell would expand


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


@pytest.mark.parametrize("script", ["one_gpu.sh", "torchrun.sh", "deepspeed.sh"])
def test_arguments_reach_the_trainer_untouched(script: str, tmp_path: Path) -> None:
    stub(tmp_path, "python", 'printf "%s\\n" "$@"')
    done = run(script, tmp_path)
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


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_a_slurm_job_is_queued_again_only_when_the_trainer_saved_and_stopped(code: int, requeued: bool, tmp_path: Path) -> None:
    stub(tmp_path, "srun", f'printf "%s\\n" "$@"; exit {code}')
    stub(tmp_path, "scontrol", 'echo "scontrol $*"')
    done = run("slurm.sbatch", tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    assert done.returncode == code
    printed = done.stdout.splitlines()
    assert printed[1:5] == ["-m", "ngpt.train", *OVERRIDES]
    assert ("scontrol requeue 7" in printed) == requeued
