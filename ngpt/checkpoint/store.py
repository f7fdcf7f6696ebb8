"""Checkpoints on disk: written to a temporary folder, published by a rename, marked complete, then pointed to; the last k are kept."""

from __future__ import annotations

import collections
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from ngpt.checkpoint.agreement import Agreement
from ngpt.checkpoint.optimizer_files import fill_, find_fitting, parts_to_write, write_optimizer
from ngpt.checkpoint.tensor_file import CheckpointError, Layout, TensorFile, write_tensors
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart

logger = logging.getLogger(__name__)

COMPLETE = ".complete"
LATEST = "latest"
WEIGHTS = "model.safetensors"
RANDOM = "random.safetensors"
STATE = "state.json"
_STEP_FOLDER = re.compile(r"step-(\d{7,})")


class CheckpointStore:
    """The folder `checkpoints/` of a run, seen by all its ranks. All methods are collective: every rank calls them, in the same order.

    A checkpoint is a folder `step-0000100` with `model.safetensors` (weights by Hugging Face name), an `optimizer-*-of-*.safetensors` of
    every rank (`ngpt.checkpoint.optimizer_files`), `random.safetensors` (generators, a row per rank), `state.json` (everything that is not
    a tensor), further `files`, and an empty `.complete`, written last. A folder without that mark is not a checkpoint: it is never
    loaded and is cleared away by the next save.

    Rank 0 decides what there is and tells the others. What fails on one rank is raised on all.

    Args:
        keep: how many checkpoints stay.
        device: where tensors of `collectives` must be.
    """

    def __init__(self, folder: Path, *, keep: int, collectives: Collectives, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self.keep = keep
        self._ranks = Agreement(collectives, device)

    def save(
        self,
        step: int,
        *,
        weights: Iterable[tuple[str, Tensor]],
        layout: Layout,
        optimizer: Mapping[str, StatePart],
        random: Mapping[str, Tensor],
        state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, point `latest` at it, and remove all but the newest `keep`.

        A step that has a complete checkpoint keeps it: a stop right after a save, or right after a resume, saves the same state again,
        and replacing a good checkpoint would for a moment leave none.

        Args:
            weights: names and whole tensors, one at a time. All ranks iterate to the end; rank 0 writes.
            layout: their dtypes and shapes; looked at on rank 0.
            optimizer: the parts of the optimizer state that this rank holds. Every rank writes its own.
            random: states of this rank's generators, of the same names and shapes on all ranks.
            state: name -> JSON-able object; rank 0's is written.
            files: name -> content of further files; rank 0's are written.

        Returns:
            The folder of the checkpoint.

        Raises:
            OSError: the disk of some rank is full or not writable; earlier checkpoints are untouched, and another save may be tried.
        """
        final = self.folder / f"step-{step:07d}"
        temporary = self.folder / f".{final.name}.tmp"
        if self._ranks.from_main(lambda: self._is_complete_or_begun(final, temporary)):
            return final
        weight_bytes = sum(shape.numel() * dtype.itemsize for dtype, shape in layout.values())
        own = parts_to_write(optimizer, self._ranks, busy_bytes=weight_bytes)
        generators = self._ranks.gather(bytes_of(dict(random)))
        stream = iter(weights)
        with self._ranks.together():
            try:
                temporary.mkdir(exist_ok=True)  # so that a network file system shows every rank the folder that rank 0 has made
                if self._ranks.rank == 0:
                    write_tensors(temporary / WEIGHTS, layout, stream, {"format": "pt"})  # which Hugging Face's reader asks for
                    _write_rest(temporary, generators, state, files or {})
            finally:  # also after an error: the ranks may be gathering each tensor together
                collections.deque(stream, maxlen=0)
            write_optimizer(temporary, own, rank=self._ranks.rank, ranks=self._ranks.size, step=step)
        self._ranks.from_main(lambda: self._publish(temporary, final))
        return final

    def newest(self) -> Path | None:
        """As `find_newest`, of this folder."""
        return self._path_from_main(lambda: find_newest(self.folder))

    def open(self, folder: Path) -> Path:
        """As `open_checkpoint`."""
        path = self._path_from_main(lambda: open_checkpoint(folder))
        assert path is not None
        return path

    def read_state(self, folder: Path) -> dict[str, Any]:
        """As `read_state`: what rank 0 reads, on every rank."""
        return self._ranks.from_main(lambda: read_state(folder))

    def read_weights(self, folder: Path, load: Callable[[TensorFile], None]) -> None:
        """Give the file of the weights to `load`, which reads what it needs, a tensor at a time.

        Raises:
            CheckpointError: the file is missing or broken, or `load` raised ValueError, as where the weights do not fit.
        """
        path = folder / WEIGHTS
        with self._ranks.together():
            try:
                load(TensorFile(path))
            except CheckpointError:
                raise
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error

    def read_optimizer(self, folder: Path, parts: Mapping[str, StatePart]) -> None:
        """Fill the live tensors of `parts`, in whatever layout they and those that were saved are.

        Raises:
            CheckpointError: a file is missing, truncated or of another save, or the state does not fit: named, with nothing changed.
        """
        with self._ranks.together():
            saved = find_fitting(folder, parts)
        with self._ranks.together():
            fill_(parts, saved)

    def read_random(self, folder: Path) -> dict[str, Tensor]:
        """The generators' states that this rank saved; a rank that was not there then gets those of another."""
        with self._ranks.together():
            file = TensorFile(folder / RANDOM)
            rows = {name: file.read(name) for name in file.names}
        return {name: by_rank[self._ranks.rank % len(by_rank)].clone() for name, by_rank in rows.items()}

    def _path_from_main(self, decide: Callable[[], Path | None]) -> Path | None:
        answer = self._ranks.from_main(lambda: None if (path := decide()) is None else str(path))
        return None if answer is None else Path(answer)

    def _is_complete_or_begun(self, final: Path, temporary: Path) -> bool:
        """True if the checkpoint is there already; else make its temporary folder."""
        if (final / COMPLETE).exists():
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_unfinished()
        temporary.mkdir()
        return False

    def _publish(self, temporary: Path, final: Path) -> None:
        _sync(temporary)
        temporary.rename(final)
        (final / COMPLETE).touch()
        _sync(final / COMPLETE)
        _sync(final)
        self._point_latest_at(final.name)
        self._prune()

    def _point_latest_at(self, name: str) -> None:
        temporary = self.folder / f".{LATEST}.tmp"
        temporary.write_text(name + "\n", encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.folder / LATEST)
        _sync(self.folder)

    def _clear_unfinished(self) -> None:
        """Remove what saves and removals that were cut off have left."""
        unmarked = [path for path in _step_folders(self.folder) if not (path / COMPLETE).exists()]
        for leftover in [*self.folder.glob(".step-*.tmp"), *unmarked]:
            shutil.rmtree(leftover)

    def _prune(self) -> None:
        for folder in sorted(_step_folders(self.folder), key=step_of)[: -self.keep]:
            (folder / COMPLETE).unlink()  # first, so that a removal that is cut off leaves no checkpoint that looks whole
            shutil.rmtree(folder)


def find_newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in a folder of them, or None. Says which newer ones it passed over, and why."""
    for checkpoint in sorted(_step_folders(folder), key=step_of, reverse=True):
        if (checkpoint / COMPLETE).exists():
            return checkpoint
        logger.warning("passing over %s: it has no %s mark, so its save was cut off", checkpoint, COMPLETE)
    return None


def open_checkpoint(folder: Path) -> Path:
    """Check that `folder` is a complete checkpoint and return it. Raises CheckpointError saying what is wrong."""
    if not folder.is_dir():
        raise CheckpointError(f"resume = {folder}: there is no such folder; give a step folder such as RUN/checkpoints/step-0000100")
    if not (folder / COMPLETE).exists():
        raise CheckpointError(f"resume = {folder}: not a complete checkpoint (no {COMPLETE} in it); choose another step folder")
    return folder


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


def _step_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]


def _write_rest(folder: Path, generators: list[bytes], state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write all that only rank 0 writes beside the weights."""
    by_rank = [tensors_of(data) for data in generators]
    random = {name: torch.stack([tensors[name] for tensors in by_rank]) for name in by_rank[0]}
    write_tensors(folder / RANDOM, {name: (rows.dtype, rows.shape) for name, rows in random.items()}, random.items())
    text = json.dumps(state, indent=1, allow_nan=False) + "\n"
    for name, content in {STATE: text.encode(), **files}.items():
        (folder / name).write_bytes(content)
        _sync(folder / name)


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
