"""The launch scripts hand their arguments to the trainer as they are, a job of a queue comes back only when its run is unfinished, and the
page on launching says nothing that does not work."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import psutil
import pytest
import yaml

from ngpt.config.compose import compose_run
from ngpt.dist.exit_codes import EXIT_DIVERGED, EXIT_PEER_LOST, EXIT_TRY_AGAIN, EXIT_UNAVAILABLE, EXIT_USER_ERROR

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


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (4, True), (69, True), (137, True), (0, False), (1, False), (2, False)])
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


def linter(name: str) -> str:
    """The path of a linter, in this environment or on PATH; the test is skipped where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [*SCRIPTS, *(REPOSITORY / ".ci").glob("*.sh"), REPOSITORY / ".ci/run"]
    done = subprocess.run([linter("shellcheck"), "--shell=bash", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------------- the image
def test_hadolint_has_nothing_to_say_about_the_image() -> None:
    done = subprocess.run([linter("hadolint"), str(REPOSITORY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_there_and_enters_its_build() -> None:
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (.*) \S+$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    named = [name for names in copied for name in names.split() if name != "."]
    install = (REPOSITORY / ".ci/install.sh").read_text()
    read = {name for name in ("constraints.txt", *re.findall(r"\.ci/[\w.]+\.(?:py|txt|sh)", install)) if name in install}
    assert read | {"pyproject.toml", ".ci/install.sh"} <= set(named), "what the installation reads comes before it"
    assert set(named) <= set(allowed)
    assert [name for name in allowed if not (REPOSITORY / name).exists()] == []


# ---------------------------------------------------------------------------------------------------------- Kubernetes
@pytest.fixture(scope="module")
def kubernetes() -> tuple[dict, dict]:
    """The service and the job of launch/kubernetes.yaml."""
    service, job = yaml.safe_load_all((REPOSITORY / "launch/kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    return service, job


def container_of(job: dict) -> dict:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def environment_of(job: dict) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container_of(job)["env"] if "value" in item}


def run_pod(job: dict, folder: Path, body: str) -> subprocess.Popen[str]:
    """The command of the second pod, two ranks strong, with `body` in place of the trainer."""
    stub(folder, "python", body)
    container = container_of(job)
    pod = environment_of(job) | {"NPROC": "2", "JOB_COMPLETION_INDEX": "1", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen([*container["command"], *container["args"]], stdout=PIPE, stderr=STDOUT, text=True, env=os.environ | pod)


def test_the_pods_find_each_other_and_have_what_the_trainer_needs(kubernetes: tuple[dict, dict]) -> None:
    service, job = kubernetes
    spec, pod, container, environment = job["spec"], job["spec"]["template"]["spec"], container_of(job), environment_of(job)
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None", "only a headless service gives each pod a name"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert int(environment["NPROC"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(environment["WORLD_SIZE"]) == spec["completions"] * int(environment["NPROC"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert re.search(r"^WORKDIR (.*)$", dockerfile, re.MULTILINE)[1] + "/runs" == container["volumeMounts"][0]["mountPath"]
    assert int(re.search(r"^USER (.*)$", dockerfile, re.MULTILINE)[1]) == pod["securityContext"]["runAsUser"]
    overrides = container["args"][2:]
    assert compose_run(overrides, check_files=False, world_size=int(environment["WORLD_SIZE"])).run.name == "c4_1b"


def test_a_pod_has_time_to_save_and_is_replaced_only_when_the_run_can_continue(kubernetes: tuple[dict, dict]) -> None:
    spec = kubernetes[1]["spec"]
    stop_timeout = re.search(r"--stop-timeout (\d+)", (REPOSITORY / "launch/docker.sh").read_text())[1]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == int(stop_timeout)
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "what a policy for failed pods asks for"
    on_exit = {rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert on_exit["FailJob"]["values"] == [EXIT_USER_ERROR, EXIT_DIVERGED]
    assert on_exit["Ignore"]["values"] == [EXIT_PEER_LOST, EXIT_TRY_AGAIN]
    assert all(EXIT_UNAVAILABLE not in rule["values"] for rule in on_exit.values()), "to be tried again, but not for ever"
    assert {rule["containerName"] for rule in on_exit.values()} == {container_of(kubernetes[1])["name"]}


def test_a_pod_starts_a_rank_for_each_gpu_and_ends_with_the_code_that_says_most(kubernetes: tuple[dict, dict], tmp_path: Path) -> None:
    body = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*"; [[ $RANK == 2 ]] && exit 2; exit 0'
    with run_pod(kubernetes[1], tmp_path, body) as pod:
        assert pod.stdout is not None
        said = sorted(pod.stdout.read().splitlines())
    arguments = " ".join(["-m ngpt.train", *container_of(kubernetes[1])["args"][2:]])
    assert said == [f"{rank} {rank - 2} 16 ngpt-0.ngpt:29500 {arguments}" for rank in (2, 3)]
    assert pod.returncode == 2


def test_a_pod_that_is_to_end_lets_its_ranks_save_and_says_that_they_did(kubernetes: tuple[dict, dict], tmp_path: Path) -> None:
    body = "trap 'sleep 0.3; echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done"
    with run_pod(kubernetes[1], tmp_path, body) as pod:
        assert pod.stdout is not None
        assert [pod.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        pod.send_signal(signal.SIGTERM)
        assert pod.stdout.read().splitlines() == ["saved", "saved"]
    assert pod.returncode == EXIT_TRY_AGAIN


# ------------------------------------------------------------------------------------------------------------- the page
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```$", (REPOSITORY / "docs/launch.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def test_the_page_has_a_recipe_for_everything_in_the_folder() -> None:
    text = "\n".join(COMMANDS)
    assert [path.name for path in (REPOSITORY / "launch").iterdir() if path.name not in text] == []


@pytest.mark.parametrize("line", [line for line in COMMANDS if "launch/" in line and "ngpt.compare" not in line and "kubectl" not in line])
def test_each_recipe_starts_the_trainer_with_settings_that_it_accepts(line: str, tmp_path: Path) -> None:
    for name in ("python", "docker", "srun"):
        stub(tmp_path, name, 'printf "%s\\n" "$@" "TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-}"')
    stub(tmp_path, "sbatch", 'while [[ $1 == --* ]]; do shift; done; SLURM_JOB_ID=1 SLURM_SUBMIT_DIR=$PWD bash "$@"')
    settings = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=settings, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    overrides = said[said.index("ngpt.train") + 1 : -1]
    assert overrides == [word for word in shlex.split(line) if re.match(r"[a-z_.]+=", word)]
    compose_run(overrides, check_files=False)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "ngpt.compare" in line])
def test_each_comparison_of_the_page_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ngpt.comparison.arms.compose_run", lambda overrides: compose_run(overrides, check_files=False))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    main = runpy.run_module("ngpt.compare")["main"]
    assert main([*shlex.split(line)[3:], "--dry-run"]) == 0
    assert "experiment=c4_60m_galore" in capsys.readouterr().out


def test_the_other_commands_of_the_page_are_few_and_name_files_that_are_there() -> None:
    others = [line for line in COMMANDS if "ngpt.compare" not in line and not re.search(r"launch/\w+\.(sh|sbatch)", line)]
    assert {line.split()[0] for line in others} == {"docker", "kubectl", "printf"}
    assert [line for line in others if line.startswith("docker")] == [
        line.lstrip("# ") for line in (REPOSITORY / "Dockerfile").read_text().splitlines()[1:2]
    ]
    assert "kubectl apply --filename launch/kubernetes.yaml" in others


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
