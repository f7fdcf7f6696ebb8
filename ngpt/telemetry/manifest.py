"""manifest.json: what ran, from which code, with which versions, on which device; written before the first step of every start."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ngpt.config.redaction import redact_argument

PACKAGES = ("torch", "deepspeed", "datasets", "sentencepiece", "hydra-core", "wandb", "numpy", "safetensors")


def write_manifest(path: Path, *, config: dict[str, Any], device: torch.device, argv: list[str], resumed_from: str | None) -> None:
    """Write `path`, or add this start to the ones already in it.

    The file holds `starts`, a list with one entry for each time the run was started: time (UTC), argv, config, versions, device,
    git commit, and the checkpoint it continued from. `config` has been redacted by the caller (`ngpt.config.redaction`).
    """
    starts: list[dict[str, Any]] = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError, TypeError):
            starts = []  # a manifest that a crash cut off must not keep the run from continuing
    starts.append(
        {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "argv": [redact_argument(argument) for argument in argv],
            "resumed_from": resumed_from,
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "git": git_state(Path(__file__).parent),
            "config": config,
        }
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"starts": starts}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; NGPT_COMMIT, which images set, outside a checkout; else None."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("NGPT_COMMIT")
        return {"commit": commit, "modified": None} if commit else None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=10).stdout


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
