"""Where records go: metrics.jsonl, always and first; Weights & Biases, where asked, and never at the cost of the run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ngpt.config.schema import LoggerConfig
from ngpt.telemetry.metrics import Record

logger = logging.getLogger(__name__)

# What a run may lose to W&B at most: for the key, for the start of its run, for another process of W&B's own, and at the end.
_LOGIN_SECONDS = 30
_INIT_SECONDS = 60
_RESTART_SECONDS = 10
_FINISH_SECONDS = 60


class JsonlSink:
    """`metrics.jsonl`: one flat JSON object a line. A resumed run first drops the records past its checkpoint, so none comes twice.

    A record that cannot be written (the disk is full, the folder was removed) is kept and written with the next one that can: training
    goes on, with one warning.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._sent = 0  # bytes of the first of them that are in the file
        self._warned = False
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Drop all records past `step`."""
        if hasattr(self, "_file"):
            self._file.close()
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:  # a line at a time: of a long run there are many
            file.writelines(f"{line}\n" for line in _lines(self._path) if _step(line) <= step)
        temporary.replace(self._path)
        self._waiting, self._sent = [line for line in self._waiting if _step(line) <= step], 0
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is in the file, though not yet forced to disk, when this returns without a warning."""
        self._waiting.append(f"{json.dumps(record, allow_nan=False)}\n".encode())
        try:
            if not self._is_there():
                logger.warning("%s was removed while the run goes on; it begins again with the next record", self._path)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file.close()
                self._file, self._sent = self._path.open("a", encoding="utf-8"), 0
            while self._waiting:
                self._sent += os.write(self._file.fileno(), self._waiting[0][self._sent :])  # a disk that fills up takes a part
                if self._sent == len(self._waiting[0]):
                    del self._waiting[0]
                    self._sent = 0
            self._warned = False
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written (%s); training goes on, and records wait in memory", self._path, error)
            self._warned = True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False


class WandbSink:
    """One W&B run, continued under the same id after a resume. No failure of W&B ends the training.

    A server that cannot be reached, is too slow or refuses the key is warned of once, and the run is logged offline instead.
    """

    def __init__(self, config: LoggerConfig, *, run_name: str, run_folder: Path, run_config: dict[str, Any], run_id: str | None) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._run: Any = None
        self._mode = config.wandb
        self._to_upload: list[Path] = []
        self._settings = {
            "project": config.project or os.environ.get("WANDB_PROJECT", "ngpt"),
            "entity": config.entity or os.environ.get("WANDB_ENTITY"),
            "group": config.group,
            "tags": list(config.tags),
            "name": run_name,
            "id": self.run_id,
            "resume": "allow",
            "dir": str(run_folder),
            "config": run_config,
        }
        if config.wandb == "disabled":
            return
        try:
            import wandb

            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # its own telemetry fails as often as the server does
            # prompt=False: a job in a queue must not wait for somebody to type a key. What cannot be verified is found here and not by
            # `init`, which would keep the run's id in use.
            if self._mode == "online" and not _within(_LOGIN_SECONDS, lambda: wandb.login(prompt=False, verify=True)):
                logger.warning(
                    "W&B: no API key found (run `wandb login` or set WANDB_API_KEY); logging offline, upload later with `wandb sync`"
                )
                self._mode = "offline"
            self._start()
        except Exception as error:  # whatever W&B raises, the run goes on
            self._fall_back("start", error)

    def write(self, record: Record) -> None:
        """Send one record; its own `step` is the x axis, so that a resumed run may pass a step again."""
        if self._run is None:
            return
        values = {name: value for name, value in record.items() if value is not None}
        try:
            self._run.log(values)
        except Exception as error:
            self._fall_back("log", error)
            if self._run is not None:
                self._run.log(values)

    def close(self, *, exit_code: int) -> None:
        """End the W&B run; anything but 0 shows it as crashed or stopped. A server that does not answer is not waited for for ever.

        What is on this machine only is named, with the command that uploads it.
        """
        if self._run is None:
            return
        run = self._run
        try:
            _within(_FINISH_SECONDS, lambda: run.finish(exit_code=exit_code))
        except Exception as error:
            self._keep_for_upload()
            self._give_up("finish", error)
        if self._to_upload:
            folders = shlex.join(map(str, self._to_upload))
            logger.info("W&B: what was logged offline is on this machine only; upload it with: wandb sync %s", folders)

    def _keep_for_upload(self) -> None:
        """What W&B has written of the present run is to be uploaded by hand."""
        with contextlib.suppress(Exception):
            folder = Path(self._run.dir).parent
            if folder not in self._to_upload:
                self._to_upload.append(folder)

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def _start(self) -> None:
        import wandb

        mode: Any = self._mode
        settings = wandb.Settings(init_timeout=_INIT_SECONDS, silent=True, console="off", save_code=False)
        if self._mode == "online" and hasattr(settings, "finish_timeout"):  # else the process's exit waits for what `finish` gave up
            settings.finish_timeout = _FINISH_SECONDS
        self._run = wandb.init(mode=mode, settings=settings, **self._settings)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._mode == "offline":
            self._keep_for_upload()

    def _begin_anew(self) -> None:
        """Start again, with another process of W&B's own: the last one has the run's id in use, or is gone."""
        import wandb

        with contextlib.suppress(Exception):
            _within(_RESTART_SECONDS, wandb.teardown)
        self._start()

    def _fall_back(self, what: str, error: Exception) -> None:
        """Log offline from here on, or not at all where that fails too."""
        if self._mode != "online":
            return self._give_up(what, error)
        if self._run is not None:
            self._keep_for_upload()
        self._mode, self._run = "offline", None
        try:
            self._begin_anew()
        except Exception:  # what went wrong first says more
            return self._give_up(what, error)
        logger.warning("W&B could not %s (%s); training goes on, logging offline: upload later with `wandb sync`", what, _first_line(error))
        return None

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        logger.warning("W&B could not %s (%s); training goes on, metrics.jsonl has everything", what, _first_line(error))


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What `function` returns or raises. Raises TimeoutError if it does not end in time; it is then left to itself."""
    outcome: list[Any] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="ngpt-wandb", daemon=True)
    thread.start()
    thread.join(timeout=seconds)
    if failures and not isinstance(failures[0], Exception):  # W&B's word for the end of its own process is SystemExit
        raise RuntimeError(repr(failures[0])) from failures[0]
    if failures:
        raise failures[0]
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return outcome[0]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)


def _step(line: str | bytes) -> float:
    """Step of a record; a line that a crash cut off counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
