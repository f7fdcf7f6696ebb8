"""One run: its parts assembled in the order in which values flow, and what happens to a result; the loop itself is in ngpt/train.py."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ngpt import build
from ngpt.checkpoint import resume, store
from ngpt.config.schema import RunConfig, engine_of_launch, steps_in_run
from ngpt.config.validate import ConfigError
from ngpt.data.documents import DataError
from ngpt.data.train_loader import merge_states
from ngpt.data.unigram import unigram_perplexity
from ngpt.dist.exit_codes import EXIT_DIVERGED, EXIT_PEER_LOST, EXIT_USER_ERROR
from ngpt.dist.process_group import choose_device, process_group, random_state, set_random_state
from ngpt.dist.ranks import LaunchError, ranks_from_environment
from ngpt.dist.replicas import ReplicasDiffer, check_replicas
from ngpt.dist.watch import PeerLost
from ngpt.loop.evaluate import EvalResult, evaluate
from ngpt.loop.stop import stop_on_signals
from ngpt.loop.train_loop import Progress, TrainingDiverged, train_loop
from ngpt.loop.train_step import StepResult
from ngpt.recorder import Recorder, due
from ngpt.summary import arguments_for_more, command, summarise
from ngpt.telemetry.console import configure_logging

__all__ = ["PeerLost", "Run", "due", "exit_code_of"]

logger = logging.getLogger(__name__)

# Errors whose texts say all that there is to say, and with what to exit; a traceback would only hide that.
_EXIT_CODES: dict[type[Exception], int] = {
    ConfigError: EXIT_USER_ERROR,
    DataError: EXIT_USER_ERROR,
    store.CheckpointError: EXIT_USER_ERROR,
    LaunchError: EXIT_USER_ERROR,
    TrainingDiverged: EXIT_DIVERGED,
    ReplicasDiffer: EXIT_PEER_LOST,
}


def exit_code_of(error: BaseException) -> int:
    """With what to exit after `error`; 1 where it is none whose text is enough."""
    if isinstance(error, PeerLost):
        return error.exit_code
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)


class Run:
    """A run from its configuration to its last checkpoint; a context manager that closes files, threads and signal handlers.

    Args:
        config: validated settings.
        arguments: the command-line overrides, for the manifest and for the commands that are printed at the end.

    Raises:
        ConfigError, DataError, CheckpointError: something that only shows once files are opened does not fit.
        PeerLost: another rank died, hangs or failed.
    """

    def __init__(self, config: RunConfig, arguments: list[str]) -> None:
        self.config = config
        self.arguments = arguments
        self.folder = Path(config.run.dir) / config.run.name
        self.ranks = ranks_from_environment()
        self.total_steps = steps_in_run(config.trainer)
        self.progress = Progress()
        self._last_eval: EvalResult | None = None
        self._resources = ExitStack()

    def __enter__(self) -> Run:
        try:
            self._assemble()
        except BaseException:
            self._resources.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.recorder.close(exit_code=self.exit_code if kind is None else 1)
        if kind is None:  # after an error an engine could wait for ranks that are gone
            self.engine.close()
        self._resources.__exit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------------------- assembly
    def _assemble(self) -> None:
        config, trainer = self.config, self.config.trainer
        self.folder.mkdir(parents=True, exist_ok=True)
        configure_logging(self.folder, rank=self.ranks.rank)
        self.stop = self._resources.enter_context(stop_on_signals())
        try:
            self.device = choose_device(trainer.device, self.ranks)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        self.collectives = self._resources.enter_context(
            process_group(
                self.ranks,
                self.device,
                timeout_seconds=config.engine.timeout_seconds,
                needed=engine_of_launch(config.engine, self.ranks.world_size) == "deepspeed",
                exit_code_of=exit_code_of,
            )
        )

        self.tokenizer = build.open_tokenizer(config)
        self.settings = resume.settings_of(config, tokenizer_fingerprint=self.tokenizer.fingerprint if self.tokenizer else None)
        together = {"collectives": self.collectives, "device": self.device}
        self.store = store.CheckpointStore(self.folder / "checkpoints", keep=config.checkpoint.keep, **together)
        checkpoint = self._checkpoint_to_resume()
        state = self._checked_state(checkpoint) if checkpoint else {}

        self.loader = build.open_train_loader(config, self.tokenizer, self.ranks, pin_memory=self.device.type == "cuda")
        self._resources.callback(self.loader.close)
        self.engine = build.build_engine(config, self.device)
        if checkpoint:
            self._restore(checkpoint, state)
        evaluates = config.eval.every_steps or config.eval.at_end
        self.eval_batches = build.read_eval_batches(config, self.tokenizer, self.ranks) if evaluates else []
        # A run that branches off from another one's checkpoint is a run of its own in W&B too.
        continues = checkpoint and checkpoint.parent.resolve() == self.store.folder.resolve()
        self.recorder = Recorder(
            config,
            self.folder,
            engine=self.engine,
            loader=self.loader,
            collectives=self.collectives,
            progress=self.progress,
            arguments=self.arguments,
            resumed_from=checkpoint,
            wandb_run_id=state["wandb"]["run_id"] if continues else None,
        )

    @property
    def _micro_batches_per_step(self) -> int:
        trainer = self.config.trainer
        return trainer.global_batch_size // (trainer.micro_batch_size * self.ranks.world_size)

    # --------------------------------------------------------------------------------------------------------- resume
    def _checkpoint_to_resume(self) -> Path | None:
        newest = self.store.newest()
        if self.config.resume == "auto":
            return newest
        if self.config.resume == "never":
            if newest:
                raise store.CheckpointError(
                    f"resume = never, but {self.folder} already has checkpoints (newest: {newest.name}); "
                    "start another run with run.name=SOMETHING_ELSE, or continue this one with resume=auto"
                )
            return None
        chosen = self.store.open(Path(self.config.resume))
        if newest and store.step_of(newest) > store.step_of(chosen):
            raise store.CheckpointError(
                f"resume = {chosen}: {self.folder} already has the newer {newest.name}, which this run would mix with; "
                "branch off with run.name=SOMETHING_ELSE, or remove the newer checkpoints first"
            )
        return chosen

    def _checked_state(self, checkpoint: Path) -> dict[str, Any]:
        state = self.store.read_state(checkpoint)
        for line in resume.check_settings(state["settings"], self.settings, checkpoint=str(checkpoint)):
            logger.info("changed since %s: %s", checkpoint.name, line)
        return state

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        self.store.read_weights(checkpoint, lambda file: self.engine.load_weights(file.read, file.names))
        self.store.read_optimizer(checkpoint, self.engine.optimizer_parts())
        self.loader.load_state_dict(state["data"])
        self.progress.load_state_dict(state["progress"])
        set_random_state(self.store.read_random(checkpoint))

    # ------------------------------------------------------------------------------------------------------- the loop
    def steps(self) -> Iterator[StepResult]:
        """The updates that are left, one result each."""
        return train_loop(
            self.engine,
            self.loader,
            self.progress,
            total_steps=self.total_steps,
            micro_batches_per_step=self._micro_batches_per_step,
            lr_multiplier=build.build_schedule(self.config.scheduler, self.total_steps),
            max_nonfinite_steps=self.config.trainer.max_nonfinite_steps,
            should_stop=lambda: self.stop.agreed(self.collectives, self.device),
            sum_over_ranks=lambda own: int(self.collectives.sum_(torch.tensor(own, device=self.device))),
        )

    @property
    def at_end(self) -> bool:
        return self.progress.step >= self.total_steps

    def record(self, result: StepResult) -> None:
        """Send a result to the console, to metrics.jsonl and to W&B, if its step is one that is logged."""
        self.recorder.step(result)

    def evaluate(self) -> None:
        """Evaluate on the held-out tokens and record the result."""
        started = time.perf_counter()
        token_bytes = self.tokenizer.token_bytes if self.tokenizer else None
        self._last_eval = evaluate(self.engine, self.eval_batches, token_bytes, self.collectives)
        self.recorder.evaluation(self._last_eval, seconds=time.perf_counter() - started)

    def check_replicas(self) -> None:
        """Raise ReplicasDiffer unless all ranks hold the same weights."""
        check_replicas(self.engine.weights(), self.collectives, step=self.progress.step)

    def save(self) -> None:
        """Write the checkpoint of this step."""
        started = time.perf_counter()
        folder = self.store.save(
            self.progress.step,
            weights=self.engine.weights(),
            layout=self.engine.weight_layout(),
            optimizer=self.engine.optimizer_parts(),
            random=random_state(),
            state={
                "progress": self.progress.state_dict(),
                "data": merge_states(self.recorder.gather(self.loader.state_dict())),
                "wandb": self.recorder.wandb.state_dict(),
                "settings": self.settings,
            },
            files={"config.yaml": self.recorder.config_text.encode()}
            | ({"tokenizer.model": self.tokenizer.model_bytes} if self.tokenizer else {}),
        )
        logger.info("checkpoint %s (%.1fs)", folder, time.perf_counter() - started)

    # -------------------------------------------------------------------------------------------------------- the end
    @property
    def exit_code(self) -> int:
        """0 unless a signal stopped the run before its last step."""
        return 0 if self.at_end else self.stop.exit_code

    def nothing_left(self) -> int:
        """Say that the run was finished before, and how to go on. Returns the exit code."""
        finished = "%s is finished already: step %d of %d; for another run give run.name=SOMETHING_ELSE"
        logger.info(finished, self.folder, self.progress.step, self.total_steps)
        logger.info("%s", self._how_to_go_on())
        return 0

    def summarise(self) -> None:
        """Draw the plot and say where things are and how to go on."""
        references = self._unigram_reference()
        if not self.ranks.is_main:
            return
        signal = self.stop.signal
        summarise(
            self.config,
            self.folder,
            self.progress,
            state="done" if self.at_end else f"stopped by {signal.name}" if signal else "stopped",
            last_eval=self._last_eval,
            references=references,
            go_on=self._how_to_go_on(),
        )

    def _how_to_go_on(self) -> str:
        if self.at_end:
            return f"train longer: {command(arguments_for_more(self.config, self.arguments), world_size=self.ranks.world_size)}"
        return f"continue: {command(self.arguments, world_size=self.ranks.world_size)}"

    def _unigram_reference(self) -> dict[str, float]:
        if not (self.at_end and self.config.eval.unigram_baseline and self.eval_batches):
            return {}
        # The same stream from its start: exactly the tokens that were trained on.
        loader = build.open_train_loader(self.config, self.tokenizer, self.ranks)
        try:
            batches = self.progress.step * self._micro_batches_per_step
            vocabulary, ranks = self.config.model.vocab_size, {"collectives": self.collectives, "device": self.device}
            return {"unigram": unigram_perplexity(loader, batches, self.eval_batches, vocabulary, **ranks)}
        finally:
            loader.close()
