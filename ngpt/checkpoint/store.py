"""Checkpoints on disk: written to a temporary folder, published by a rename, marked complete, then pointed to; the last k are kept."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

COMPLETE = ".complete"
LATEST = "latest"
WEIGHTS = "model.safetensors"
STATE = "state.json"
_STEP_FOLDER = re.compile(r"step-(\d{7,})")


class CheckpointError(ValueError):
    """A checkpoint is missing, unfinished or unreadable."""


class Stateful(Protocol):
    """Anything with a state of plain numbers, strings, lists and dicts that a run must continue from."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    A checkpoint is a folder `step-0000100` with `model.safetensors` (weights by Hugging Face name), one `NAME.pt` for every
    entry of `tensors`, `state.json` (everything that is not a tensor), further `files`, and an empty `.complete`, written last. A folder
    without that mark is not a checkpoint: it is never loaded and is cleared away by the next save.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        *,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Any],
        state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, point `latest` at it, and remove all but the newest `keep`.

        A step that has a complete checkpoint keeps it: a stop right after a save, or right after a resume, saves the same state again,
        and replacing a good checkpoint would for a moment leave none.

        Args:
            weights: tensors that share no memory.
            tensors: name -> object that `torch.load(weights_only=True)` can read back.
            state: name -> JSON-able object.
            files: name -> content of further files.

        Returns:
            The folder of the checkpoint.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        name = f"step-{step:07d}"
        final, temporary = self.folder / name, self.folder / f".{name}.tmp"
        if (final / COMPLETE).exists():
            return final
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_unfinished()
        temporary.mkdir()
        save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, temporary / WEIGHTS)
        for key, value in tensors.items():
            torch.save(value, temporary / f"{key}.pt")
        (temporary / STATE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for key, content in (files or {}).items():
            (temporary / key).write_bytes(content)
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        temporary.rename(final)
        (final / COMPLETE).touch()
        _sync(final / COMPLETE)
        _sync(final)
        self._point_latest_at(name)
        self._prune()
        return final

    def newest(self) -> Path | None:
        """The complete checkpoint with the highest step, or None. Says which newer folders it passed over, and why."""
        for folder in sorted(self._step_folders(), key=step_of, reverse=True):
            if (folder / COMPLETE).exists():
                return folder
            logger.warning("passing over %s: it has no %s mark, so its save was cut off", folder, COMPLETE)
        return None

    def _step_folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]

    def _point_latest_at(self, name: str) -> None:
        temporary = self.folder / f".{LATEST}.tmp"
        temporary.write_text(name + "\n", encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.folder / LATEST)
        _sync(self.folder)

    def _clear_unfinished(self) -> None:
        """Remove what saves and removals that were cut off have left."""
        unmarked = [path for path in self._step_folders() if not (path / COMPLETE).exists()]
        for leftover in [*self.folder.glob(".step-*.tmp"), *unmarked]:
            shutil.rmtree(leftover)

    def _prune(self) -> None:
        for folder in sorted(self._step_folders(), key=step_of)[: -self.keep]:
            (folder / COMPLETE).unlink()  # first, so that a removal that is cut off leaves no checkpoint that looks whole
            shutil.rmtree(folder)


def open_checkpoint(folder: Path) -> Path:
    """Check that `folder` is a complete checkpoint and return it. Raises CheckpointError saying what is wrong."""
    if not folder.is_dir():
        raise CheckpointError(f"resume = {folder}: there is no such folder; give a step folder such as RUN/checkpoints/step-0000100")
    if not (folder / COMPLETE).exists():
        raise CheckpointError(f"resume = {folder}: not a complete checkpoint (no {COMPLETE} in it); choose another step folder")
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint, by name, on the CPU. Raises CheckpointError where the file is missing or broken."""
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def read_tensors(folder: Path, name: str) -> Any:
    """The entry `name` of the checkpoint's `tensors`, on the CPU; nothing but tensors and plain values is ever unpickled."""
    path = folder / f"{name}.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a broken file
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """All that the checkpoint knows beside tensors. Raises CheckpointError where the file is missing or broken."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE} does not hold a JSON object")
    return state


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
