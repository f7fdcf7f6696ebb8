"""The manifest of a checkpoint: which files it has, their sizes and SHA-256, of which run and step; and whether all that is still so.

`.complete`, the mark that a checkpoint is whole, holds the SHA-256 of `manifest.json`, and that file the ones of all others. A mark that is
empty, beside no manifest, is of a checkpoint from before there were any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ngpt.checkpoint.tensor_file import CheckpointError, FileRecord, record_of

COMPLETE = ".complete"
MANIFEST = "manifest.json"
FORMAT, VERSION = "ngpt checkpoint", 1
LONGEST_MANIFEST = 64 << 20  # bytes; one of 100,000 ranks has 15 MB
_MARK_LENGTH = 65  # 64 hexadecimal digits and a line end
_STEP_FOLDER = re.compile(r"step-(\d{7,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # no way out of the folder


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint knows of itself.

    `run` is an identifier made at the first save of a run, `ranks` the number of processes that wrote, `files` all but this and the mark.
    """

    run: str
    step: int
    ranks: int
    files: Mapping[str, FileRecord]

    def to_bytes(self) -> bytes:
        """The file."""
        head = {"format": FORMAT, "version": VERSION, "run": self.run, "step": self.step, "ranks": self.ranks}
        files = {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())}
        return (json.dumps({**head, "files": files}, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Raises ValueError where this is no manifest."""
        tree = json.loads(content)
        try:
            if (tree["format"], tree["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is {tree['format']!r}, version {tree['version']!r}; known is {FORMAT!r}, version {VERSION}")
            files = {name: FileRecord(record["size"], record["sha256"]) for name, record in tree["files"].items()}
            manifest = cls(tree["run"], tree["step"], tree["ranks"], files)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it does not describe a checkpoint: {error!r}") from error
        numbers = [manifest.step, manifest.ranks, *(record.size for record in files.values())]
        texts = [manifest.run, *(record.sha256 for record in files.values())]
        strange = [name for name in files if not _FILE_NAME.fullmatch(name)]
        if strange or not all(type(number) is int for number in numbers) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"it does not describe a checkpoint{': a file is called ' + repr(strange[0]) if strange else ''}")
        return manifest


# ------------------------------------------------------------------------------------------------------------------- folders
def step_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints, complete or not, the highest step first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step-"))


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint's save came to its end; nothing is said of what has happened to its files since."""
    return (folder / COMPLETE).exists()


# ------------------------------------------------------------------------------------------------------------------- writing
def write_durably(path: Path, content: bytes) -> FileRecord:
    """Write a file, under its name only once it is on disk: at any moment it is there whole, or as it was before. Raises OSError."""
    temporary = path.with_name(f".{path.name.lstrip('.')}.tmp")
    temporary.write_bytes(content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark_complete(folder: Path, manifest: FileRecord) -> None:
    """Make a folder, whose files and whose `manifest` are on disk, a checkpoint."""
    write_durably(folder / COMPLETE, f"{manifest.sha256}\n".encode())


# ------------------------------------------------------------------------------------------------------------------- checking
def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete checkpoint; None where it is from before there were any.

    Raises:
        CheckpointError: there is no mark, the manifest is missing, broken or not the one that was written, or it is of another step.
    """
    mark, path = folder / COMPLETE, folder / MANIFEST
    try:
        with mark.open("rb") as file:
            seal = file.read(_MARK_LENGTH + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {COMPLETE} mark, so its save was cut off") from error
    except OSError as error:
        raise CheckpointError(f"{mark} cannot be read: {error}") from error
    if not seal and not path.exists():
        return None
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_MANIFEST + 1)
        if len(content) > LONGEST_MANIFEST:
            raise ValueError(f"it is longer than {LONGEST_MANIFEST} bytes")
        if hashlib.sha256(content).hexdigest().encode() + b"\n" != seal:
            raise ValueError(f"its content has changed since the save, or that of {COMPLETE}, which has its SHA-256")
        manifest = Manifest.from_bytes(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be trusted: {error}") from error
    if _STEP_FOLDER.fullmatch(folder.name) and manifest.step != step_of(folder):
        raise CheckpointError(f"{folder} has another name than it was saved under: its manifest says step {manifest.step}")
    return manifest


def problems_of(folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, contents: bool = True) -> Iterator[str]:
    """What is wrong with the files `names` (None: all of them), each by its path.

    Args:
        contents: read all and compare its SHA-256; without, only that files are there, in their sizes.
    """
    for name in sorted(manifest.files if names is None else names):
        path, record = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != record.size:
                yield f"{path} has {size:,} bytes, but {record.size:,} were saved"
            elif contents and record_of(path) != record:
                yield f"{path}: its content is not what was saved{_origin(path, manifest)}"
        except FileNotFoundError:
            yield f"{path} is missing"
        except OSError as error:
            yield f"{path} cannot be read: {error}"


def strangers_in(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files of optimizer state that do not belong to this save; others may lie there."""
    for path in sorted(folder.glob("optimizer-*")):
        if path.name not in manifest.files:
            yield f"{path} does not belong to this checkpoint"


def problems(folder: Path, *, contents: bool = True) -> list[str]:
    """All that is wrong with a checkpoint; nothing is known of the files of one from before there were manifests."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    return [] if manifest is None else [*problems_of(folder, manifest, contents=contents), *strangers_in(folder, manifest)]


def _origin(path: Path, manifest: Manifest) -> str:
    """Where a file comes from, if its header tells that it is another save."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
        head = file.metadata() or {}
        step, run = head.get("step", str(manifest.step)), head.get("run", manifest.run)
        if step != str(manifest.step):
            return f" (it is of step {step})"
        if run != manifest.run:
            return f" (it is of step {step} of another run)"
    return ""
