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

from ngpt import build, out_of_memory
from ngpt.checkpoint import resume, store
from ngpt.config.problems import problem
from ngpt.config.schema import RunConfig, engine_of_launch, steps_in_run
from ngpt.config.validate import ConfigError
from ngpt.data.documents import DataError, DataUnavailable
from ngpt.data.train_loader import merge_states, position_of
from ngpt.data.unigram import unigram_perplexity
from ngpt.dist.activity import Activity
from ngpt.dist.exit_codes import EXIT_DIVERGED, EXIT_PEER_LOST, EXIT_UNAVAILABLE, EXIT_USER_ERROR
from ngpt.dist.folder_lock import FolderInUse, only_run_in
from ngpt.dist.process_group import choose_device, deterministic_algorithms, process_group, random_state, set_random_state
from ngpt.dist.ranks import LaunchError, ranks_from_environment
from ngpt.dist.replicas import ReplicasDiffer, check_position, check_replicas
from ngpt.dist.watch import PeerLost
from ngpt.initial_weights import begin_with
from ngpt.loop.evaluate import EvalResult, evaluate
from ngpt.loop.spikes import SpikeRule
from ngpt.loop.stop import stop_on_signals
from ngpt.loop.train_loop import Progress, TrainingDiverged, train_loop
from ngpt.loop.train_step import StepResult
from ngpt.model.llama import LlamaForCausalLM
from ngpt.recorder import Recorder, due
from ngpt.samples import Samples
from ngpt.summary import arguments_for_more, command, summarise
from ngpt.telemetry.console import configure_logging
from ngpt.telemetry.profiler import ProfilerWindow

__all__ = ["DataError", "PeerLost", "Run", "due", "exit_code_of"]

logger = logging.getLogger(__name__)

# Errors whose texts say all that there is to say, and with what to exit; a traceback would only hide that.
_EXIT_CODES: dict[type[Exception], int] = {
    ConfigError: EXIT_USER_ERROR,
    DataUnavailable: EXIT_UNAVAILABLE,  # before DataError, of which it is a kind
    DataError: EXIT_USER_ERROR,
    store.CheckpointError: EXIT_USER_ERROR,
    LaunchError: EXIT_USER_ERROR,
    FolderInUse: EXIT_USER_ERROR,
    out_of_memory.OutOfMemory: EXIT_USER_ERROR,
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
        self.activity = Activity(self.folder / f"stacks.rank-{self.ranks.rank}.log")
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
        self._open_folder()
        self._resources.enter_context(deterministic_algorithms(trainer.deterministic))
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
                activity=self.activity,
                hang_seconds=trainer.hang_seconds,
            )
        )
        if self.ranks.is_main:
            self._resources.enter_context(only_run_in(self.folder))
        snapshot = self.folder / f"memory.rank-{self.ranks.rank}.pickle" if trainer.memory_snapshot else None
        if snapshot and self.device.type != "cuda":
            rule = f"needs an NVIDIA GPU, whose memory is what it records (the device is {self.device})"
            raise ConfigError([problem("trainer.memory_snapshot", True, rule, "leave it out")])
        self._resources.enter_context(out_of_memory.explained(self._describe_memory, snapshot=snapshot))

        self.tokenizer = build.open_tokenizer(config)
        self.settings = resume.settings_of(config, tokenizer_fingerprint=self.tokenizer.fingerprint if self.tokenizer else None)
        together = {"collectives": self.collectives, "device": self.device}
        kept = {"keep": config.checkpoint.keep, "keep_every": config.checkpoint.keep_every}
        self.store = store.CheckpointStore(self.folder / "checkpoints", **kept, asynchronous=config.checkpoint.asynchronous, **together)
        self._resources.callback(self.store.close)
        self.store.check_writable()
        checkpoint = self._checkpoint_to_resume()
        state = self._checked_state(checkpoint) if checkpoint else {}

        self.loader = build.open_train_loader(config, self.tokenizer, self.ranks, pin_memory=self.device.type == "cuda")
        self._resources.callback(self.loader.close)
        self.activity.now("building the model")
        self.engine = build.build_engine(config, self.device)
        if checkpoint:
            self._restore(checkpoint, state)
        elif config.model.init_from:
            self.activity.now(f"reading {config.model.init_from}")
            begin_with(self.engine, Path(config.model.init_from).expanduser(), config.model)
        self._data_state = self.loader.state_dict()
        self.activity.now("reading held-out text")
        evaluates = config.eval.every_steps or config.eval.at_end
        self.eval_batches = build.read_eval_batches(config, self.tokenizer, self.ranks) if evaluates else []
        self._samples = self._open_samples()
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

    def _open_samples(self) -> Samples | None:
        config = self.config
        if not (config.eval.sample_prompts and self.ranks.is_main):
            return None
        assert self.tokenizer is not None
        samples = Samples(
            config.eval,
            self.tokenizer,
            max_seq_len=config.model.max_seq_len,
            path=self.folder / "samples.jsonl",
            seed=config.seed,
            resume_step=self.progress.step,
        )
        self._resources.callback(samples.close)
        return samples

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            configure_logging(self.folder, rank=self.ranks.rank)
            if self.ranks.is_main:  # as root, and on some network file systems, only writing shows what may be written
                probe = self.folder / ".probe"
                probe.write_bytes(b"1")
                probe.unlink()
        except OSError as error:
            rule = f"must be a folder that can be written ({error.strerror or error})"
            fix = "set run.dir to another folder, or make this one writable"
            raise ConfigError([problem("run.dir", str(self.folder), rule, fix)]) from error

    def _describe_memory(self) -> str:
        engine = getattr(self, "engine", None)
        return out_of_memory.description(
            self.config,
            engine.state_bytes() if engine else None,
            world_size=self.ranks.world_size,
            device=self.device,
            when=self.activity.text,
        )

    @property
    def _micro_batches_per_step(self) -> int:
        trainer = self.config.trainer
        return trainer.global_batch_size // (trainer.micro_batch_size * self.ranks.world_size)

    # --------------------------------------------------------------------------------------------------------- resume
    def _checkpoint_to_resume(self) -> Path | None:
        if self.config.resume == "auto":
            return self.store.newest_good()
        newest = self.store.newest()
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
        self.loader.load_state_dict(state["data"])
        self._restore_training(checkpoint, state["progress"])

    def _restore_training(self, checkpoint: Path, progress: dict[str, Any]) -> None:
        """All of a checkpoint but the place in the data."""
        self.store.read_weights(checkpoint, lambda file: self.engine.load_weights(file.read, file.names))
        self.store.read_optimizer(checkpoint, self.engine.optimizer_parts())
        self.progress.load_state_dict(progress)
        set_random_state(self.store.read_random(checkpoint))

    # ------------------------------------------------------------------------------------------------------- the loop
    def steps(self) -> Iterator[StepResult]:
        """The updates that are left, one result each."""
        trainer = self.config.trainer
        window = {"first": trainer.profile_at, "steps": trainer.profile_steps, "rank": self.ranks.rank, "device": self.device}
        profiler = ProfilerWindow(self.folder / "profile", **window)
        self._resources.callback(profiler.close)
        profiler.before(self.progress.step + 1)
        self.activity.now(f"step {self.progress.step + 1}")
        for result in train_loop(
            self.engine,
            self.loader,
            self.progress,
            total_steps=self.total_steps,
            micro_batches_per_step=self._micro_batches_per_step,
            lr_multiplier=build.build_schedule(self.config.scheduler, self.total_steps),
            max_nonfinite_steps=trainer.max_nonfinite_steps,
            should_stop=lambda: self.stop.agreed(self.collectives, self.device),
            sum_over_ranks=self._sum_over_ranks,
            texts_of_ranks=self.recorder.gather,
            # Updates that take place inside backward are done when the loss is known.
            spike_rule=SpikeRule(
                trainer.spike_window,
                trainer.spike_deviations,
                drop=trainer.on_spike != "log" and self.config.optimizer.apply != "immediate",
            ),
            watch_every=self.config.logger.statistics_every,
        ):
            self._data_state = self.loader.state_dict()  # a later step that cannot read its data leaves the loader in between
            self.activity.now(f"after step {result.step}")
            yield result
            profiler.before(self.progress.step + 1)
            self.activity.now(f"step {self.progress.step + 1}")

    def _sum_over_ranks(self, own: int) -> int:
        if self.ranks.world_size == 1:  # no trip to the device, and no wait for it, in every step
            return own
        return int(self.collectives.sum_(torch.tensor(own, device=self.device)))

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
        evaluating = f"evaluation after step {self.progress.step}"
        self._last_eval = evaluate(
            self.engine, self.eval_batches, token_bytes, self.collectives, on_batch=lambda: self.activity.now(evaluating)
        )
        self.recorder.evaluation(self._last_eval, seconds=time.perf_counter() - started)
        if self._samples is not None:
            assert isinstance(self.engine.model, LlamaForCausalLM)
            self._samples.write(self.engine.model, step=self.progress.step, tokens=self.progress.tokens)

    def roll_back(self) -> None:
        """Go back to the last checkpoint, all but the place in the data: on with the batches that follow.

        Raises:
            TrainingDiverged: that was done `trainer.max_rollbacks` times already.
        """
        progress, most = self.progress, self.config.trainer.max_rollbacks
        self._wait_for_save()
        checkpoint = self.store.newest_good()
        if checkpoint is None:
            logger.warning("step %d: there is no checkpoint yet to go back to", progress.step)
            return
        if progress.rollbacks >= most:
            raise TrainingDiverged(
                f"step {progress.step}: another loss spike after {most} rollbacks (trainer.max_rollbacks); lower optimizer.lr, set "
                "trainer.grad_clip, and look at the batches in loss_spikes.jsonl of the run folder"
            )
        self.activity.now(f"going back from step {progress.step}")
        logger.warning("step %d: back to %s, and on with the batches that follow", progress.step, checkpoint.name)
        kept = {name: getattr(progress, name) for name in ("loss_spikes", "skipped_steps", "seconds")}
        kept["rollbacks"] = progress.rollbacks + 1
        self._restore_training(checkpoint, self.store.read_state(checkpoint)["progress"] | kept)
        self.recorder.rewind(progress.step)
        if self._samples is not None:
            self._samples.rewind(progress.step)

    def check_replicas(self) -> None:
        """Raise ReplicasDiffer unless all ranks hold the same weights, where all hold them, and are at the same place in the data."""
        step, tokens = self.progress.step, self.progress.tokens
        check_position(position_of(self._data_state) | {"the tokens counted": tokens}, self.collectives, step=step, device=self.device)
        if self.config.engine.zero_stage < 3 or self.ranks.world_size == 1:
            check_replicas(self.engine.weights(), self.collectives, step=step)

    def save(self, *, last: bool = False) -> None:
        """Write the checkpoint of this step, or begin to. The `last` one of a run must be there: its failure is an error."""
        started = time.perf_counter()
        self.activity.now(f"saving step {self.progress.step}")
        state = {
            "progress": self.progress.state_dict(),
            "data": merge_states(self.recorder.gather(self._data_state)),
            "wandb": self.recorder.wandb.state_dict(),
            "settings": self.settings,
        }
        tokenizer = {"tokenizer.model": self.tokenizer.model_bytes} if self.tokenizer else {}
        self._wait_for_save()
        with store.failures_tolerated(self.config.checkpoint.on_error, last=last):
            folder = self.store.save(
                self.progress.step,
                weights=self.engine.weights(),
                layout=self.engine.weight_layout(),
                optimizer=self.engine.optimizer_parts(),
                random=random_state(),
                state=state,
                files={"config.yaml": self.recorder.config_text.encode()} | tokenizer,
            )
            if last:
                self.store.wait()
            logger.info("checkpoint %s (%.1fs)", folder, time.perf_counter() - started)

    def save_before_error(self) -> None:
        """Write the checkpoint of the last step that was finished, if there is one, before the run ends with an error of all ranks."""
        if self.progress.step:
            self.save(last=True)

    def _wait_for_save(self) -> None:
        """Wait until a checkpoint that is written in the background is there."""
        with store.failures_tolerated(self.config.checkpoint.on_error):
            self.store.wait()

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
        self._wait_for_save()
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
