"""comparison.json: which runs a comparison has, and how far each of them is; what a command that was killed goes on from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ngpt.comparison.arms import Arm
from ngpt.config.problems import ConfigError, problem, shown
from ngpt.config.redaction import redact_argument
from ngpt.dist.exit_codes import EXIT_DIVERGED

NAME = "comparison.json"
_VERSION = 1
Status = Literal["waiting", "running", "stopped", "failed", "done"]


@dataclasses.dataclass
class RunState:
    """How far one run is.

    Attributes:
        name: of its folder, in the folder of the comparison.
        exit_code: of its last start; negative: the number of the signal that ended it.
        starts: how often it was started.
        seconds: for which it ran, all starts together.
        said: the last words of one that failed.
    """

    name: str
    arm: str
    seed: int
    status: Status = "waiting"
    exit_code: int | None = None
    starts: int = 0
    seconds: float = 0.0
    said: str = ""

    @property
    def is_over(self) -> bool:
        """Whether starting it again would change nothing."""
        return self.status == "done" or (self.status == "failed" and self.exit_code == EXIT_DIVERGED)


class Ledger:
    """The file of a comparison, which is written whole at every change.

    Raises:
        ConfigError: the folder has another comparison, or an arm of this one with other settings.
    """

    def __init__(self, folder: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        self._path = folder / NAME
        self.runs = [RunState(f"{arm.label}-seed{seed}", arm.label, seed) for seed in seeds for arm in arms]
        before = self._read(folder)
        self._check(folder, arms, before.get("arms", {}))
        known = {run["name"]: run for run in before.get("runs", [])}
        self.runs = [RunState(**known.pop(run.name, dataclasses.asdict(run))) for run in self.runs]
        # Arms and seeds that this command does not name are not forgotten.
        self._others = list(known.values())
        self._arms = before.get("arms", {}) | {
            arm.label: {"column": arm.column, "overrides": [redact_argument(word) for word in arm.overrides], "settings": arm.settings}
            for arm in arms
        }

    def write(self) -> None:
        """Write the file."""
        runs = [dataclasses.asdict(run) for run in self.runs] + self._others
        seeds = sorted({run["seed"] for run in runs})
        content = {"version": _VERSION, "seeds": seeds, "runs": runs, "arms": self._arms}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def _read(self, folder: Path) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["version"] == _VERSION and all(RunState(**run) for run in content["runs"]):
                return content
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            pass
        raise ConfigError([problem("--to", str(folder), f"its {NAME} is not one of this program", "give another folder")])

    def _check(self, folder: Path, arms: Sequence[Arm], before: dict[str, Any]) -> None:
        """Refuse to mix runs of different settings under one name. A setting that the file does not have is newer than it."""
        problems = []
        for arm in arms:
            then = before.get(arm.label, {}).get("settings", {})
            changed = [f"{path} = {shown(then[path])}" for path, value in arm.settings.items() if path in then and then[path] != value]
            if changed:
                rule = f"{folder} has runs of this name with {', '.join(changed)}"
                problems.append(problem("--arm", arm.label, rule, "give the arm another name, or the comparison another folder with --to"))
        if problems:
            raise ConfigError(problems)
