"""A trainer that takes no time: it writes what a run leaves behind, and fails, waits or is killed where a test says so."""

from __future__ import annotations

import functools
import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.comparison import arms
from ngpt.config.compose import compose_run
from ngpt.config.schema import RunConfig

# Read at each start: plan.json maps a run's name to what it does. `losses` of a run are its held-out losses at the end.
TRAINER = r"""
import json, os, pathlib, signal, sys, time

settings = dict(word.partition("=")[::2] for word in sys.argv[1:])
name, folder = settings["run.name"], pathlib.Path(settings["run.dir"]) / settings["run.name"]
plan = json.loads(pathlib.Path("plan.json").read_text())
asked = plan.get(name, {})
with open("starts.txt", "a") as file:
    file.write(name + "\n")
first = not folder.exists()
folder.mkdir(parents=True, exist_ok=True)
def end(code):
    sys.exit(code)
if asked.get("killed") and first:
    os.kill(os.getpid(), signal.SIGKILL)
if asked.get("interrupts") and first:  # its parent is told to stop, and it saves
    signal.signal(signal.SIGTERM, lambda *_: end(75))
    os.kill(os.getppid(), getattr(signal, asked["interrupts"]))
    time.sleep(60)
if asked.get("listens") and first:  # a Ctrl-C that reaches it by itself would be one too many
    signal.signal(signal.SIGTERM, lambda *_: end(75))
    signal.signal(signal.SIGINT, lambda *_: end(99))
    pathlib.Path("up").touch()
    time.sleep(60)
if asked.get("stubborn"):  # it does not listen, and its parent is told twice
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
    time.sleep(60)
while asked.get("waits") and not pathlib.Path("go").exists():
    time.sleep(0.02)
if "fails" in asked:
    print(asked.get("says", "the data are broken"), file=sys.stderr)
    end(asked["fails"])
steps = int(settings["trainer.max_steps"])
records = [{"step": step, "tokens": 64 * step, "train/loss": 5.0, "time/step_s": asked.get("seconds", 0.1),
            "memory/weights_gib": 0.5, "memory/optimizer_state_gib": asked.get("state", 1.0),
            "memory/peak_allocated_gib": asked.get("peak", 2.0)}
           for step in range(1, steps + 1)]
loss = asked.get("loss", 3.0)
records.append({"step": asked.get("stops_at", steps), "tokens": asked.get("tokens", 64 * steps), "val/loss": loss, "val/tokens": 1000,
                "val/perplexity": 20.0, "val/perplexity_galore_protocol": asked.get("protocol", 19.5), "val/bits_per_byte": 1.5})
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
(folder / "config.yaml").write_text("run: {name: " + name + "}\n")
"""
COMMON = ["data=synthetic", "trainer.max_steps=4", "model=llama_9m", "optimizer=adamw"]


class Comparison:
    """`python -m ngpt.compare` in the folder of a test, with the stub as its trainer."""

    def __init__(self, folder: Path, run: Callable[[list[str]], int]) -> None:
        self.folder, self._run = folder, run
        (folder / "train.py").write_text(TRAINER)
        (folder / "train.sh").write_text(f'exec {shlex.quote(sys.executable)} -S train.py "$@"\n')
        self.plan()

    def plan(self, **asked: dict[str, object]) -> None:
        """What the runs are to do, by name with an underscore for the hyphen."""
        (self.folder / "plan.json").write_text(json.dumps({name.replace("_", "-"): what for name, what in asked.items()}))

    def __call__(self, *arguments: str) -> int:
        return self._run(self.arguments(*arguments))

    def arguments(self, *arguments: str) -> list[str]:
        arms = ["--arm", "a", "optimizer.lr=0.001", "--arm", "b", "optimizer.lr=0.002"] if "--arm" not in arguments else []
        return [*COMMON, "--launcher", "bash train.sh", "--to", "out", *arms, *arguments]

    @property
    def starts(self) -> list[str]:
        """The runs that were started, in order, since this was last asked."""
        path = self.folder / "starts.txt"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names

    @property
    def runs(self) -> dict[str, dict]:
        return {run["name"]: run for run in json.loads((self.folder / "out/comparison.json").read_text())["runs"]}

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ngpt.compare", *self.arguments(*arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@functools.lru_cache
def composed(*overrides: str) -> RunConfig:
    return compose_run(list(overrides))


@pytest.fixture(autouse=True)
def _composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing takes a quarter of a second, and most tests want the same arms."""
    monkeypatch.setattr(arms, "compose_run", lambda overrides: composed(*overrides))


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    return Comparison(tmp_path, runpy.run_module("ngpt.compare")["main"])
