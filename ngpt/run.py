"""One run: its parts assembled in the order in which values flow, and what happens to a result; the loop itself is in ngpt/train.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

from ngpt import build
from ngpt.checkpoint import resume, store
from ngpt.config.optimizers import LoRAConfig
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
from ngpt.engine.local import weight_dtype
from ngpt.loop.evaluate import EvalResult, evaluate
from ngpt.loop.stop import stop_on_signals
from ngpt.loop.train_loop import Progress, TrainingDiverged, train_loop
from ngpt.loop.train_step import StepResult
from ngpt.model import cost
from ngpt.telemetry.console import configure_logging, duration, eval_line, progress_bar, step_line
from ngpt.telemetry.manifest import write_manifest
from ngpt.telemetry.metrics import Record, StepMetrics, device_memory, device_peak_flops, eval_record
from ngpt.telemetry.plot import plot_run
from ngpt.telemetry.sinks import JsonlSink, WandbSink

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


def due(every_steps: int, step: int) -> bool:
    """Whether something done every `every_steps` steps (0: never) is due after `step`."""
    return every_steps > 0 and step % every_steps == 0


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
        self.wandb.close(exit_code=self.exit_code if kind is None else 1)
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
        self.resumed_step = self.progress.step
        evaluates = config.eval.every_steps or config.eval.at_end
        self.eval_batches = build.read_eval_batches(config, self.tokenizer, self.ranks) if evaluates else []
        self._open_telemetry(checkpoint, state)

    def _open_telemetry(self, checkpoint: Path | None, state: dict[str, Any]) -> None:
        """Begin what rank 0 alone writes; W&B and the bar are there on other ranks too, and silent."""
        config, trainer, is_main = self.config, self.config.trainer, self.ranks.is_main
        as_dict = dataclasses.asdict(config)
        self._config_text = yaml.safe_dump(as_dict, sort_keys=False)
        if is_main:
            (self.folder / "config.yaml").write_text(self._config_text, encoding="utf-8")
            write_manifest(
                self.folder / "manifest.json",
                config=as_dict,
                device=self.device,
                argv=self.arguments,
                resumed_from=checkpoint.name if checkpoint else None,
            )
            self.jsonl = JsonlSink(self.folder / "metrics.jsonl", resume_step=self.progress.step)
            self._resources.callback(self.jsonl.close)
        self.wandb = WandbSink(
            config.logger if is_main else dataclasses.replace(config.logger, wandb="disabled"),
            run_name=config.run.name,
            run_folder=self.folder,
            run_config=as_dict,
            # A run that branches off from another one's checkpoint is a run of its own there too.
            run_id=state["wandb"]["run_id"] if checkpoint and checkpoint.parent.resolve() == self.store.folder.resolve() else None,
        )
        self.metrics = StepMetrics(
            flops_per_token=cost.flops_per_token(config.model, trainer.seq_len, adapter_rank=self._adapter_rank),
            peak_flops=trainer.peak_flops or (device_peak_flops(self.device, weight_dtype(trainer.precision)) if is_main else 1.0),
            world_size=self.ranks.world_size,
        )
        self._announce(checkpoint)
        self._bar = self._resources.enter_context(progress_bar(total_steps=self.total_steps, done=self.progress.step, shown=is_main))

    def _announce(self, checkpoint: Path | None) -> None:
        config, trainer = self.config, self.config.trainer
        sizes = self.engine.state_bytes()
        adapters = cost.adapter_parameter_count(config.model, self._adapter_rank)
        logger.info(
            "%s: %s parameters%s, %s on %s, %s | %s steps of %s x %s tokens in micro-batches of %s",
            config.run.name,
            f"{cost.parameter_count(config.model):,}",
            f" and {adapters:,} of adapters" if adapters else "",
            config.optimizer.name,
            self.device,
            trainer.precision,
            f"{self.total_steps:,}",
            trainer.global_batch_size,
            trainer.seq_len,
            trainer.micro_batch_size,
        )
        logger.info(
            "weights %.1f MiB, optimizer state %.1f MiB | run folder %s",
            sizes["weights"] / 2**20,
            sizes["optimizer_state"] / 2**20,
            self.folder,
        )
        if checkpoint:
            logger.info("continuing from %s: step %d, %s tokens", checkpoint, self.progress.step, f"{self.progress.tokens:,}")

    @property
    def _adapter_rank(self) -> int:
        return self.config.optimizer.rank if isinstance(self.config.optimizer, LoRAConfig) else 0

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

    def nothing_left(self) -> int:
        """Say that the run was finished before, and how to go on. Returns the exit code."""
        logger.info(
            "%s is finished already: step %d of %d; for another run give run.name=SOMETHING_ELSE",
            self.folder,
            self.progress.step,
            self.total_steps,
        )
        logger.info("train longer: %s", self._command(self._arguments_for_more()))
        return 0

    def record(self, result: StepResult) -> None:
        """Send a result to the console, to metrics.jsonl and to W&B, if its step is one that is logged."""
        self.metrics.add(result)
        self._bar.update()
        if not result.update.applied or result.update.skipped_matrices:
            self._record_skipped(result)
        regular = result.step == 1 or self.at_end or due(self.config.logger.every_steps, result.step)
        if not regular and result.step != self.resumed_step + 1:
            return
        memory, sources = self._over_ranks(device_memory(self.device), self.loader.stats())
        record = self.metrics.record(
            result, state_bytes=self.engine.state_bytes(), memory=memory, sources=sources, communication=self.engine.communication()
        )
        seconds_left = (self.total_steps - result.step) * (record["time/step_s"] or 0)
        logger.info("%s", step_line(record, total_steps=self.total_steps, seconds_left=seconds_left))
        if regular:  # the first line after a resume is a sign of life on the console; the uninterrupted run has no such record
            self._publish(record)

    def _publish(self, record: Record) -> None:
        if self.ranks.is_main:
            self.jsonl.write(record)
            self.wandb.write(record)

    def _over_ranks(self, memory: dict[str, float], sources: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """This rank's memory beside the highest peak of all ranks; counters of the data added up, and the longest wait."""
        if self.ranks.world_size == 1:
            return memory, sources
        peaks, counters = zip(*self._gather([memory["peak_allocated"], sources]), strict=True)
        added = {name: sum(of_rank.get(name, 0) for of_rank in counters) for name in sources}
        longest = max(of_rank["wait_seconds"] for of_rank in counters)
        return memory | {"peak_allocated_largest": max(peaks)}, added | {"wait_seconds": longest}

    def _gather(self, value: Any) -> list[Any]:
        """What each rank has, by rank; JSON-able."""
        return [json.loads(data) for data in self.collectives.gather_bytes(json.dumps(value).encode(), self.device)]

    def _record_skipped(self, result: StepResult) -> None:
        update = result.update
        what = f"{update.skipped_matrices} matrices left out of the update" if update.applied else "update skipped"
        identity = {
            "step": result.step,
            "what": what,
            "loss": repr(update.loss),
            "grad_norm": repr(update.grad_norm),
            "batches": list(itertools.chain(*self._gather([batch.identity() for batch in result.batches]))),
        }
        if self.ranks.is_main:
            with (self.folder / "nonfinite_steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(identity) + "\n")
        logger.warning(
            "step %d: loss %s, gradient norm %s: %s (%d steps so far)",
            result.step,
            update.loss,
            update.grad_norm,
            what,
            result.skipped_steps,
        )

    def evaluate(self) -> None:
        """Evaluate on the held-out tokens and record the result."""
        started = time.perf_counter()
        token_bytes = self.tokenizer.token_bytes if self.tokenizer else None
        self._last_eval = evaluate(self.engine, self.eval_batches, token_bytes, self.collectives)
        record = eval_record(self.progress.step, self.progress.tokens, self._last_eval, seconds=time.perf_counter() - started)
        logger.info("%s", eval_line(record, total_steps=self.total_steps))
        self._publish(record)

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
                "data": merge_states(self._gather(self.loader.state_dict())),
                "wandb": self.wandb.state_dict(),
                "settings": self.settings,
            },
            files={"config.yaml": self._config_text.encode()} | ({"tokenizer.model": self.tokenizer.model_bytes} if self.tokenizer else {}),
        )
        logger.info("checkpoint %s (%.1fs)", folder, time.perf_counter() - started)

    # -------------------------------------------------------------------------------------------------------- the end
    @property
    def exit_code(self) -> int:
        """0 unless a signal stopped the run before its last step."""
        return 0 if self.at_end else self.stop.exit_code

    def summarise(self) -> None:
        """Draw the plot and say where things are and how to go on."""
        references = self._unigram_reference()
        if not self.ranks.is_main:
            return
        picture = self.folder / "metrics.png"
        plot_run(self.folder / "metrics.jsonl", picture, title=self.config.run.name, references=references)
        signal = self.stop.signal
        state = "done" if self.at_end else f"stopped by {signal.name}" if signal else "stopped"
        logger.info(
            "%s: step %d/%d, %s tokens in %s of training, %d skipped updates",
            state,
            self.progress.step,
            self.total_steps,
            f"{self.progress.tokens:,}",
            duration(self.progress.seconds),
            self.progress.skipped_steps,
        )
        if self._last_eval and references:
            unigram = references["unigram"]
            share = self._last_eval.perplexity / unigram
            logger.info(
                "held-out perplexity %.2f; a unigram model of the same training tokens: %.2f (%.3f of it)",
                self._last_eval.perplexity,
                unigram,
                share,
            )
        newest = store.find_newest(self.store.folder)
        logger.info("metrics %s | picture %s | newest checkpoint %s", self.folder / "metrics.jsonl", picture, newest)
        if self.at_end:
            logger.info("train longer: %s", self._command(self._arguments_for_more()))
        else:
            logger.info("continue: %s", self._command(self.arguments))

    def _command(self, arguments: list[str]) -> str:
        """The command that starts this run with `arguments`, as a user would type it."""
        if self.ranks.world_size == 1:
            return command_line(arguments)
        return f"(with the launcher of this run) {shlex.join(['-m', 'ngpt.train', *arguments])}"

    def _arguments_for_more(self) -> list[str]:
        """This run's arguments with twice its length."""
        setting, value = (
            ("trainer.max_tokens", self.config.trainer.max_tokens)
            if self.config.trainer.max_tokens
            else ("trainer.max_steps", self.total_steps)
        )
        assert value is not None
        return [argument for argument in self.arguments if not argument.startswith(f"{setting}=")] + [f"{setting}={2 * value}"]

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


def command_line(arguments: list[str]) -> str:
    """The command that starts this run with `arguments`, as a user would type it."""
    interpreter = Path(sys.executable)
    shown = str(interpreter.relative_to(Path.cwd())) if interpreter.is_relative_to(Path.cwd()) else "python"
    return shlex.join([shown, "-m", "ngpt.train", *arguments])
