"""Where records go: metrics.jsonl, always and first; Weights & Biases, where asked, and never at the cost of the run."""

from __future__ import annotations

import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from ngpt.config.schema import LoggerConfig
from ngpt.telemetry.metrics import Record

logger = logging.getLogger(__name__)


class JsonlSink:
    """`metrics.jsonl`: one flat JSON object a line. A resumed run first drops the records past its checkpoint, so none comes twice."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        kept = [line for line in _lines(path) if _step(line) <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record; it is in the file, though not yet forced to disk, when this returns."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbSink:
    """One W&B run, continued under the same id after a resume. Every failure is logged once and ends the sink, not the training."""

    def __init__(self, config: LoggerConfig, *, run_name: str, run_folder: Path, run_config: dict[str, Any], run_id: str | None) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._run: Any = None
        if config.wandb == "disabled":
            return
        try:
            import wandb

            mode: Any = config.wandb
            # prompt=False: a job in a queue must not wait for somebody to type a key.
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                logger.warning(
                    "W&B: no API key found (run `wandb login` or set WANDB_API_KEY); logging offline, upload later with `wandb sync`"
                )
                mode = "offline"
            self._run = wandb.init(
                mode=mode,
                project=config.project or os.environ.get("WANDB_PROJECT", "ngpt"),
                entity=config.entity or os.environ.get("WANDB_ENTITY"),
                group=config.group,
                tags=list(config.tags),
                name=run_name,
                id=self.run_id,
                resume="allow",
                dir=str(run_folder),
                config=run_config,
                settings=wandb.Settings(init_timeout=60, silent=True, console="off", save_code=False),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever W&B raises, the run goes on
            self._give_up("start", error)

    def write(self, record: Record) -> None:
        """Send one record; its own `step` is the x axis, so that a resumed run may pass a step again."""
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in record.items() if value is not None})
        except Exception as error:
            self._give_up("log", error)

    def close(self, *, exit_code: int) -> None:
        """End the W&B run; anything but 0 shows it as crashed or stopped."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up("finish", error)

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        logger.warning("W&B could not %s (%s: %s); training goes on, metrics.jsonl has everything", what, type(error).__name__, error)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """Step of a record; a line that a crash cut off counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
