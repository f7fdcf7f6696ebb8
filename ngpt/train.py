"""The command that trains: `python -m ngpt.train model=llama_60m optimizer=natural_galore data=c4 trainer.max_steps=10000`.

The same module runs under `torchrun -m ngpt.train` and `deepspeed --module ngpt.train`. Settings are composed and checked before torch
is imported, so that a mistake in an override is answered at once. `train` is the loop; ngpt/run.py assembles its parts.
"""

from __future__ import annotations

import os
import sys

import hydra
from omegaconf import DictConfig

from ngpt.config.compose import (
    CONF_DIR,
    config_of_job,
    refuse_multirun_under_launcher,
    register_schema,
    strip_launcher_arguments,
)
from ngpt.config.schema import RunConfig
from ngpt.config.validate import ConfigError, validate


def train(config: RunConfig, arguments: list[str]) -> int:
    """Train as `config` says. Returns the exit code: 0 done, 75 stopped by SIGTERM or SIGUSR1 after saving, 130 by Ctrl-C after saving."""
    from ngpt.run import Run, due  # noqa: PLC0415  (imports torch, see above)

    with Run(config, arguments) as run:
        for result in run.steps():
            run.record(result)
            if due(config.eval.every_steps, result.step) and not run.at_end:
                run.evaluate()
            if due(config.checkpoint.every_steps, result.step) and not run.at_end:
                run.save()
        if run.at_end and config.eval.at_end:
            run.evaluate()
        if config.checkpoint.at_end or not run.at_end:
            run.save()
        run.summarise()
        return run.exit_code


def main() -> None:
    """Entry point: exits with the code of `train`, with 2 and a message for a mistake of the user's."""
