"""The command that trains: `python -m ngpt.train model=llama_60m optimizer=natural_galore data=c4 trainer.max_steps=10000`.

The same module runs under `torchrun -m ngpt.train` and `deepspeed --module ngpt.train`. Settings are composed and checked before torch
is imported, so that a mistake in an override is answered at once. `train` is the loop; ngpt/run.py assembles its parts.
"""

from __future__ import annotations

import os
import sys
import time

import hydra
from omegaconf import DictConfig

from ngpt.config.compose import (
    CONF_DIR,
    check_arguments,
    refuse_multirun_under_launcher,
    register_schema,
    run_name_in_sweep,
    strip_launcher_arguments,
    to_run_config,
    with_open_settings,
)
from ngpt.config.redaction import redact, redact_argument
from ngpt.config.schema import RunConfig
from ngpt.config.validate import ConfigError, validate
from ngpt.dist.exit_codes import EXIT_USER_ERROR
from ngpt.dist.ranks import LaunchError, ranks_from_environment

SECONDS_FOR_RANK_0 = 20
SECONDS_FOR_SPEAKER = 5


def train(config: RunConfig, arguments: list[str]) -> int:
    """Train as `config` says. Returns the exit code (`ngpt.dist.exit_codes`): done, or stopped by a signal after saving."""
    from ngpt.run import DataError, Run, due

    with Run(config, arguments) as run:
        if run.at_end:
            return run.nothing_left()
        try:
            for result in run.steps():
                run.record(result)
                if result.spike and config.trainer.on_spike == "rollback":
                    run.roll_back()
                    continue
                if due(config.engine.check_replicas_every, result.step):
                    run.check_replicas()
                if due(config.eval.every_steps, result.step) and not run.at_end:
                    run.evaluate()
                if due(config.checkpoint.every_steps, result.step) and not run.at_end:
                    run.save()
        except DataError:
            run.save_before_error()
            raise
        if run.at_end and config.eval.at_end:
            run.evaluate()
        if config.checkpoint.at_end or not run.at_end:
            run.save(last=True)
        run.summarise()
        return run.exit_code


def main() -> None:
    """Entry point: exits with the code of `train`, or with that of an error whose message says it all."""
    os.umask(os.umask(0) | 0o002)  # nothing that a run writes can be changed by everybody on the machine
    arguments = strip_launcher_arguments(sys.argv[1:])
    try:
        world_size = ranks_from_environment().world_size
        refuse_multirun_under_launcher(arguments, world_size)
        check_arguments(arguments)
    except (ConfigError, LaunchError) as error:
        sys.exit(_report(error, EXIT_USER_ERROR))
    exit_codes: list[int] = []

    @hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> None:
        exit_codes.append(_run_job(composed, arguments, world_size))

    sys.argv = [sys.argv[0], *with_open_settings(arguments)]
    register_schema()
    job()
    sys.exit(max(exit_codes, default=0))


def _run_job(composed: DictConfig, arguments: list[str], world_size: int) -> int:
    """Train one job and return its exit code; a job of a sweep that fails does not keep the others from running."""
    try:
        config = to_run_config(composed)
        config.run.name = run_name_in_sweep(config.run.name, arguments)
        validate(config, world_size=world_size)
    except ConfigError as error:
        return _report(error, EXIT_USER_ERROR)
    sys.argv[1:] = [redact_argument(argument) for argument in sys.argv[1:]]  # what libraries record of a process, as W&B does
    from ngpt.run import PeerLost, exit_code_of

    try:
        code = train(config, arguments)
    except PeerLost as error:
        if error.speaks:
            sys.stderr.write(f"\n{error}\n")
        else:  # the first rank that ends makes launchers end all others: leave the one that speaks the time for it
            time.sleep(SECONDS_FOR_SPEAKER)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)  # what is left of a broken process group may wait for the others for ever
    except Exception as error:
        code = exit_code_of(error)
        if code == 1:
            raise
        return _report(error, code)
    if code:
        sys.exit(code)  # stopped by a signal: the jobs of a sweep that are left must not start
    return code


def _report(error: Exception, exit_code: int) -> int:
    """Say what is wrong, once: as a rule every rank has made the same mistake, and rank 0 speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        # A launcher ends all ranks as soon as the first one ends: leave rank 0 the time to speak. Its end ends this wait.
        time.sleep(SECONDS_FOR_RANK_0)
    sys.stderr.write(f"\n{redact(str(error))}\n")
    sys.stderr.flush()
    return exit_code


if __name__ == "__main__":
    main()
