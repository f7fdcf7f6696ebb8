"""One process to a run folder: a lock file that names who has it, and that a process which died does not keep."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

NAME = "run.lock"
_BEAT_SECONDS = 10.0


class FolderInUse(RuntimeError):
    """Another process trains in this folder."""


@contextlib.contextmanager
def only_run_in(folder: Path, *, beat_seconds: float = _BEAT_SECONDS) -> Iterator[None]:
    """Hold the lock of `folder` while the body runs.

    The file says which process of which machine has it. The kernel knows on its own machine whether that one lives. For another machine's
    the file changes every `beat_seconds`: where it does not for three times as long, that machine has lost the run.

    Raises:
        FolderInUse: naming the process that trains there.
        OSError: the folder is not writable.
    """
    path = folder / NAME
    file = _take(path, beat_seconds)
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(file, stop, beat_seconds), name="ngpt-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):  # the folder may be gone
            if _is_file_of(path, file):
                path.unlink()
        os.close(file)


def _take(path: Path, beat_seconds: float) -> int:
    """The descriptor of the lock file, locked and with this process in it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(file):
                raise FolderInUse(_refusal(path.parent, _owner(file)))
            if _is_file_of(path, file):  # and not one that its owner has just removed
                _wait_for_other_machine(path.parent, file, beat_seconds)
                _write(file, beats=0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> bool:
    """Whether no living process has the file locked. File systems without locks answer yes; what the file says is then all there is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s: this file system has no locks; a second run in the folder is told by the process number alone", error.strerror)
        owner = _owner(file)
        return not (owner.get("host") == socket.gethostname() and owner["pid"] != os.getpid() and psutil.pid_exists(owner["pid"]))
    return True


def _wait_for_other_machine(folder: Path, file: int, beat_seconds: float) -> None:
    """Refuse where a process of another machine still writes to the file; take it over, and say so, from one that does not."""
    owner = _owner(file)
    if not owner:
        return
    if owner["host"] != socket.gethostname():
        logger.warning("%s was used by process %d on %s; looking whether that still runs", folder, owner["pid"], owner["host"])
        deadline = time.monotonic() + 3 * beat_seconds
        while time.monotonic() < deadline:
            time.sleep(beat_seconds / 10)
            if _owner(file) != owner:
                raise FolderInUse(_refusal(folder, owner))
    logger.warning("process %d on %s ended without releasing %s; this run takes it over", owner["pid"], owner["host"], folder)


def _beat(file: int, stop: threading.Event, seconds: float) -> None:
    beats = 0
    while not stop.wait(seconds):
        beats += 1
        with contextlib.suppress(OSError):  # a full disk is not this thread's business
            _write(file, beats=beats)


def _write(file: int, *, beats: int) -> None:
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "beats": beats})
    os.pwrite(file, text.encode() + b"\n", 0)
    os.ftruncate(file, len(text) + 1)


def _owner(file: int) -> dict:
    """What the file says; nothing where it is new or was cut off."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(os.pread(file, 4096, 0))
        return {"pid": int(owner["pid"]), "host": str(owner["host"]), "beats": owner["beats"]}
    return {}


def _refusal(folder: Path, owner: dict) -> str:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return f"{folder}: {who} trains in this run folder already; wait for it, stop it, or start another run with run.name=SOMETHING_ELSE"


def _is_file_of(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
