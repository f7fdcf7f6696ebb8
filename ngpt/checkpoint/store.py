"""Checkpoints on disk: written to a temporary folder, published by a rename, marked complete, then pointed to; verified when read."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as bytes_of
from torch import Tensor

from ngpt.checkpoint import retention
from ngpt.checkpoint.agreement import Agreement
from ngpt.checkpoint.background import BackgroundSave, Records
from ngpt.checkpoint.contents import RANDOM, WEIGHTS, Contents, bytes_of_layout
from ngpt.checkpoint.integrity import (
    COMPLETE,
    MANIFEST,
    Manifest,
    is_complete,
    mark_complete,
    problems_of,
    read_manifest,
    step_folders,
    step_of,
    strangers_in,
    sync,
    write_durably,
)
from ngpt.checkpoint.optimizer_files import fill_, find_fitting, parts_to_write
from ngpt.checkpoint.tensor_file import CheckpointError, FileRecord, Layout, TensorFile
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart

__all__ = ["COMPLETE", "CheckpointError", "CheckpointStore", "failures_tolerated", "find_newest", "open_checkpoint", "step_of"]

logger = logging.getLogger(__name__)

LATEST = "latest"
RUN_ID = "run-id"
STATE = "state.json"
PROBLEMS_SHOWN = 3
SECONDS_TO_CLOSE = 60  # for a save in the background to come to its end when a run ends with an error


class CheckpointStore:
    """The folder `checkpoints/` of a run, seen by all its ranks. All methods but `close` are collective: every rank calls them, in the
    same order.

    A checkpoint is a folder `step-0000100` with `model.safetensors` (weights by Hugging Face name), an `optimizer-*-of-*.safetensors` of
    every rank (`ngpt.checkpoint.optimizer_files`), `random.safetensors` (generators, a row per rank), `state.json` (everything that is not
    a tensor), further `files`, `manifest.json` (`ngpt.checkpoint.integrity`), and `.complete`, written last. A folder without that mark is
    not a checkpoint: it is never loaded and is cleared away by the next save.

    Rank 0 decides what there is and tells the others. What fails on one rank is raised on all.

    Args:
        keep: how many good checkpoints stay.
        keep_every: those whose step is a multiple of this stay too; 0 for none.
        asynchronous: save in a thread, from a copy in the CPU's memory.
        device: where tensors of `collectives` must be.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        collectives: Collectives,
        keep_every: int = 0,
        asynchronous: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self._ranks = Agreement(collectives, device)
        self._pending: BackgroundSave | None = None
        self._bad: set[Path] = set()  # found to be so when the run started

    # ------------------------------------------------------------------------------------------------------------- saving
    def check_writable(self) -> None:
        """Make the folder. Raises CheckpointError if some rank could not write a checkpoint into it, though it may be full later."""
        try:
            self._ranks.from_main(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            with self._ranks.together():
                probe = self.folder / f".probe-{self._ranks.rank:05d}"
                probe.write_bytes(b"")
                probe.unlink()
        except OSError as error:
            raise CheckpointError(f"no checkpoints can be written to {self.folder}: {error}; make it writable, or set run.dir") from error

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
        """Write the checkpoint of `step`, point `latest` at it, and remove those that are too old.

        A step that has a good checkpoint keeps it: a stop right after a save, or right after a resume, saves the same state again,
        and replacing a good checkpoint would for a moment leave none.

        If `asynchronous`, return once a copy is made; `wait` or the next save says whether it was written. One save is on its way at most.

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
            OSError: the disk of some rank is full or not writable, or would be; earlier checkpoints are untouched, and another save
                may be tried.
            NotFinite (CheckpointError, where ranks are several): weights, or masters of them, are not finite. The same holds.
        """
        self.wait()
        final = self.folder / f"step-{step:07d}"
        temporary = self.folder / f".{final.name}.tmp"
        run = self._ranks.from_main(lambda: self._begin(final, temporary))
        if run is None:
            return final
        try:
            stream = iter(weights)
            texts: dict[str, bytes] = {}
            with self._ranks.together():
                texts = {STATE: (json.dumps(state, indent=1, allow_nan=False) + "\n").encode(), **(files or {})}
            contents = Contents(
                run=run,
                step=step,
                rank=self._ranks.rank,
                ranks=self._ranks.size,
                weights=stream,
                layout=layout,
                optimizer=parts_to_write(optimizer, self._ranks, busy_bytes=bytes_of_layout(layout)),
                generators=self._ranks.gather(bytes_of(dict(random))),
                files=texts,
            )
            self._check_space(contents)
            self._write(contents, stream, temporary, final)
        except (OSError, ValueError):
            self._discard(temporary, final)
            raise
        return final

    def wait(self) -> None:
        """Wait for a save in the background, if there is one, until it is published. Raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with self._ranks.together():
                pending.wait_for_files()
            with self._ranks.together():
                pending.wait_for_publication()
        except (OSError, ValueError):
            pending.cancel()
            self._discard(pending.folder, self.folder / pending.folder.name[1:].removesuffix(".tmp"))
            raise

    def close(self) -> None:
        """When a run ends with an error: give a save in the background some time, without asking other ranks, which may be gone."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            if pending.wait_for_publication(SECONDS_TO_CLOSE):
                pending.wait_for_files()
            else:
                logger.warning("the checkpoint in %s was left unfinished", pending.folder)
        except (OSError, ValueError) as error:
            logger.warning("the checkpoint in %s could not be written: %s", pending.folder, error)

    def _write(self, contents: Contents, stream: Iterator[tuple[str, Tensor]], temporary: Path, final: Path) -> None:
        """Write and publish, or begin to."""
        records: Records = {}
        with self._ranks.together():
            try:
                temporary.mkdir(exist_ok=True)  # so that a network file system shows every rank the folder that rank 0 has made
                if self.asynchronous:
                    contents = contents.copied()
                elif self._ranks.rank == 0:
                    records = contents.write(temporary)
            finally:  # also after an error: the ranks may be gathering each tensor together
                collections.deque(stream, maxlen=0)
            if not self.asynchronous and self._ranks.rank != 0:
                records = contents.write(temporary)
        if self.asynchronous:
            self._pending = BackgroundSave(
                temporary,
                write=lambda: contents.write(temporary),
                publish=(lambda written: self._publish(contents, written, temporary, final)) if self._ranks.rank == 0 else None,
                rank=self._ranks.rank,
                ranks=self._ranks.size,
            )
            return
        of_all = self._gather({name: [record.size, record.sha256] for name, record in records.items()})
        records = {name: FileRecord(*record) for of_rank in of_all for name, record in of_rank.items()}
        self._ranks.from_main(lambda: self._publish(contents, records, temporary, final))

    def _begin(self, final: Path, temporary: Path) -> str | None:
        """Make the temporary folder and return the identifier of the run; None if there is a good checkpoint of this step already."""
        if is_complete(final) and final not in self._bad and retention.looks_good(final):
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in step_folders(self.folder):  # those that a resume has passed over
            if step_of(folder) >= step_of(final) and is_complete(folder):
                retention.set_aside(folder)
        retention.clear_unfinished(self.folder)
        temporary.mkdir()
        run = self._run_id()
        if run is None:
            run = uuid.uuid4().hex
            write_durably(self.folder / RUN_ID, f"{run}\n".encode())
        return run

    def _check_space(self, contents: Contents) -> None:
        """Raises OSError if the files of all ranks have no room, before any of them is begun."""
        needed = sum(self._gather(contents.num_bytes))

        def check() -> None:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                text = f"a checkpoint needs {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free in {self.folder}"
                raise OSError(errno.ENOSPC, text)

        self._ranks.from_main(check)

    def _publish(self, contents: Contents, records: Records, temporary: Path, final: Path) -> None:
        manifest = Manifest(contents.run, contents.step, contents.ranks, records)
        record = write_durably(temporary / MANIFEST, manifest.to_bytes())
        sync(temporary)
        temporary.rename(final)
        sync(self.folder)
        mark_complete(final, record)
        write_durably(self.folder / LATEST, f"{final.name}\n".encode())
        self._bad.discard(final)
        self._prune()

    def _prune(self) -> None:
        try:
            for checkpoint in retention.to_remove(self.folder, keep=self.keep, keep_every=self.keep_every, is_good=self._looks_good):
                retention.remove(checkpoint)
        except OSError as error:  # which the new checkpoint has nothing to do with
            logger.warning("an old checkpoint could not be removed: %s", error)

    def _looks_good(self, checkpoint: Path) -> bool:
        return checkpoint not in self._bad and retention.looks_good(checkpoint)

    def _discard(self, temporary: Path, final: Path) -> None:
        """Remove what a save that failed has left, which on a full disk takes the room of the next one."""
        if self._ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            if final.is_dir() and not is_complete(final):
                shutil.rmtree(final, ignore_errors=True)

    def _run_id(self) -> str | None:
        """Identifier of the run whose checkpoints these are: the one in a file, unless all manifests agree that it has another."""
        found = []
        for folder in step_folders(self.folder):
            with contextlib.suppress(CheckpointError):
                manifest = read_manifest(folder)
                found += [manifest.run] if manifest else []
        with contextlib.suppress(OSError):
            written = (self.folder / RUN_ID).read_bytes()[:64].decode(errors="replace").strip()
            if written and (written in found or not found):
                return written
        return found[0] if found and len(set(found)) == 1 else None

    # ------------------------------------------------------------------------------------------------------------ finding
    def newest(self) -> Path | None:
        """As `find_newest`, of this folder: the newest that is complete, whatever has happened to its files since."""
        return self._path_from_main(lambda: find_newest(self.folder))

    def newest_good(self) -> Path | None:
        """The newest checkpoint all of whose files are what was saved; None if no save has come to its end yet. Says which newer ones
        it passed over, and why.

        Raises:
            CheckpointError: there are checkpoints, or have been, and none of them is good.
        """
        there = self._ranks.from_main(
            lambda: {
                "names": [checkpoint.name for checkpoint in step_folders(self.folder)],
                "begun": (self.folder / LATEST).exists() or any(map(is_complete, step_folders(self.folder))),
                "run": self._run_id(),
            }
        )
        reasons = []
        for name in there["names"]:
            found = self._problems(self.folder / name, run=there["run"])
            if not found:
                return self.folder / name
            self._bad.add(self.folder / name)
            reasons.append(f"{name}: {shortened(found)}")
            logger.warning("passing over %s: %s", self.folder / name, shortened(found))
        if there["begun"]:
            listed = "".join(f"\n  {reason}" for reason in reasons) or "\n  there is no step folder in it"
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be continued from:{listed}\n"
                "nothing was changed, and training does not begin again at step 0 by itself: put the files back, or remove that folder "
                "or set run.name=SOMETHING_ELSE to begin again"
            )
        return None

    def open(self, folder: Path) -> Path:
        """Check that `folder` is a complete checkpoint whose files are what was saved. Raises CheckpointError naming those that are not."""
        path = self._path_from_main(lambda: open_checkpoint(folder))
        assert path is not None
        if found := self._problems(path, run=None):
            raise CheckpointError(f"resume = {folder}: {shortened(found)}; choose another step folder, or put the file back")
        return path

    def _problems(self, checkpoint: Path, *, run: str | None) -> list[str]:
        """All that is wrong with a checkpoint, the same on all ranks, each of which reads its share of the files.

        Args:
            run: whose it must be, if that is known.
        """
        try:
            text = self._ranks.from_main(lambda: _manifest_text(checkpoint, run))
        except CheckpointError as error:
            return [str(error)]
        if text is None:
            logger.warning("%s has no %s, as it is from before checkpoints had one: its files are not verified", checkpoint, MANIFEST)
            return []
        manifest = Manifest.from_bytes(text.encode())
        own = list(problems_of(checkpoint, manifest, share_of(manifest, self._ranks.rank, self._ranks.size)))
        return [problem for of_rank in self._gather(own) for problem in of_rank]

    # ------------------------------------------------------------------------------------------------------------ reading
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
            for name, by_rank in rows.items():
                if not by_rank.ndim or not len(by_rank):
                    raise CheckpointError(f"{file.path}: {name} is {tuple(by_rank.shape)}, not a row for each rank")
        return {name: by_rank[self._ranks.rank % len(by_rank)].clone() for name, by_rank in rows.items()}

    def _gather(self, value: Any) -> list[Any]:
        """What each rank has, JSON-able, by rank."""
        return [json.loads(data) for data in self._ranks.gather(json.dumps(value).encode())]

    def _path_from_main(self, decide: Callable[[], Path | None]) -> Path | None:
        answer = self._ranks.from_main(lambda: None if (path := decide()) is None else str(path))
        return None if answer is None else Path(answer)


@contextlib.contextmanager
def failures_tolerated(on_error: str, *, last: bool = False) -> Iterator[None]:
    """A save that fails in the body is warned of, or raised as CheckpointError if `on_error` is "stop" or no other save will follow."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        text = f"a checkpoint could not be written: {error}"
        if last or on_error == "stop":
            raise CheckpointError(f"{text}; the checkpoints before it are as they were") from error
        logger.warning("%s; the run goes on, and the next save is tried as always (checkpoint.on_error=stop would end it here)", text)


def find_newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in a folder of them, or None. Says which newer ones it passed over, and why."""
    for checkpoint in step_folders(folder):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("passing over %s: it has no %s mark, so its save was cut off", checkpoint, COMPLETE)
    return None


def open_checkpoint(folder: Path) -> Path:
    """Check that `folder` is a complete checkpoint and return it. Raises CheckpointError saying what is wrong."""
    if not folder.is_dir():
        raise CheckpointError(f"resume = {folder}: there is no such folder; give a step folder such as RUN/checkpoints/step-0000100")
    if not is_complete(folder):
        raise CheckpointError(f"resume = {folder}: not a complete checkpoint (no {COMPLETE} in it); choose another step folder")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """All that the checkpoint knows beside tensors. Raises CheckpointError where the file is missing or broken."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE} does not hold a JSON object")
    return state


def share_of(manifest: Manifest, rank: int, ranks: int) -> list[str]:
    """The files that one of `ranks` verifies: each is read once, and all ranks read about as much."""
    loads, own = [0] * ranks, []
    for name in sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name)):
        reader = loads.index(min(loads))
        loads[reader] += manifest.files[name].size
        if reader == rank:
            own.append(name)
    return own


def shortened(found: list[str]) -> str:
    """Problems in a line, the first few of them."""
    return "; ".join(found[:PROBLEMS_SHOWN]) + (f"; and {len(found) - PROBLEMS_SHOWN} more" if len(found) > PROBLEMS_SHOWN else "")


def _manifest_text(checkpoint: Path, run: str | None) -> str | None:
    """The manifest of a checkpoint, if it has one. Raises CheckpointError where it is broken or of another run than `run`."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return None
    if run is not None and manifest.run != run:
        raise CheckpointError(f"it is of another run (to go on from it all the same, give resume={checkpoint})")
    strangers = list(strangers_in(checkpoint, manifest))
    if strangers:
        raise CheckpointError(shortened(strangers))
    return manifest.to_bytes().decode()
