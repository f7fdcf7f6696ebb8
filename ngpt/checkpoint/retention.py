"""Which checkpoints stay: the newest that are good, and milestones; a broken one never takes the place of a good one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from ngpt.checkpoint.integrity import COMPLETE, is_complete, problems, step_folders, step_of

logger = logging.getLogger(__name__)

PASSED_OVER = ".passed-over"  # ends the name of a folder that a run went back behind


def looks_good(folder: Path) -> bool:
    """Whether a checkpoint is complete and its files are there in their sizes; contents are not read."""
    return not problems(folder, contents=False)


def to_remove(folder: Path, *, keep: int, keep_every: int = 0, is_good: Callable[[Path], bool] = looks_good) -> list[Path]:
    """The checkpoints, and what is left of them, that may go: all that is older than the newest `keep` good ones, but for milestones.

    Nothing goes while there are fewer good ones than that, and nothing that is newer than them.

    Args:
        keep: at least 1.
        keep_every: steps that are a multiple of this stay; 0 for none.
    """
    good = []
    for checkpoint in step_folders(folder):  # the newest first; is_good may be slow, and is asked no more often than needed
        if is_good(checkpoint):
            good.append(checkpoint)
        if len(good) == keep:
            break
    if len(good) < keep:
        return []
    oldest = step_of(good[-1])
    old = [path for path in step_folders(folder) if step_of(path) < oldest and not (keep_every and step_of(path) % keep_every == 0)]
    return old + [path for path in passed_over(folder) if step_of(path.with_suffix("")) < oldest]


def passed_over(folder: Path) -> list[Path]:
    """Folders that were set aside."""
    return sorted(folder.glob(f"step-*{PASSED_OVER}"))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its mark first, so that a removal that is cut off leaves none that looks whole. Raises OSError."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def set_aside(checkpoint: Path) -> None:
    """Take a checkpoint out of the row of a run that went on from an older one; its files stay, under another name. Raises OSError."""
    target = checkpoint.with_name(checkpoint.name + PASSED_OVER)
    if target.exists():
        shutil.rmtree(target)
    checkpoint.rename(target)
    logger.warning("%s was passed over when the run went on, and is now called %s", checkpoint, target.name)


def clear_unfinished(folder: Path) -> None:
    """Remove what saves and removals that were cut off have left. Raises OSError."""
    for leftover in [*folder.glob(".step-*.tmp"), *(path for path in step_folders(folder) if not is_complete(path))]:
        shutil.rmtree(leftover)
