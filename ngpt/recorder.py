"""What a run says of itself while it goes on: manifest, metrics.jsonl, W&B, TensorBoard, log lines; of its ranks, rank 0 writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from ngpt.config.optimizers import LoRAConfig
from ngpt.config.redaction import redact_settings
from ngpt.config.schema import LoggerConfig, RunConfig, steps_in_run
from ngpt.data.train_loader import TrainLoader
from ngpt.dist.collectives import Collectives
from ngpt.engine.base import Engine
from ngpt.engine.local import weight_dtype
from ngpt.loop.evaluate import EvalResult
from ngpt.loop.train_loop import Progress
from ngpt.loop.train_step import StepResult
from ngpt.model import cost
from ngpt.planning.memory import estimate_memory
from ngpt.planning.page import against_plan, short_plan
from ngpt.telemetry.console import eval_line, progress_bar, step_line
from ngpt.telemetry.layers import layer_record
from ngpt.telemetry.manifest import write_manifest
from ngpt.telemetry.metrics import Record, StepMetrics, device_memory, device_peak_flops, eval_record
from ngpt.telemetry.sinks import JsonlSink, WandbSink
from ngpt.telemetry.tensorboard import TensorBoardSink

logger = logging.getLogger(__name__)

FIRST_STEPS = 3  # of a start, after which the highest memory so far is compared with the plan


def due(every_steps: int, step: int) -> bool:
    """Whether something done every `every_steps` steps (0: never) is due after `step`."""
    return every_steps > 0 and step % every_steps == 0


class Recorder:
    """Turns results into records and sends them to the console, to metrics.jsonl, and where asked to W&B and TensorBoard.

    All ranks call it together: some figures are of all of them. Only rank 0 writes.

    Args:
        folder: of the run.
        progress: where the run starts, and goes on.
        arguments: the command-line overrides, for the manifest.
        resumed_from: the checkpoint that the run continues from.
        wandb_run_id: of the W&B run to continue.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        engine: Engine,
        loader: TrainLoader,
        collectives: Collectives,
        progress: Progress,
        arguments: list[str],
        resumed_from: Path | None,
        wandb_run_id: str | None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._engine = engine
        self._loader = loader
        self._collectives = collectives
        self._is_main = collectives.rank == 0
        self._progress = progress
        self._total_steps = steps_in_run(config.trainer)
        self._resumed_step = progress.step
        self._resources = ExitStack()
        as_dict = redact_settings(dataclasses.asdict(config))  # for all that is written and sent
        self.config_text = yaml.safe_dump(as_dict, sort_keys=False)
        if self._is_main:
            (folder / "config.yaml").write_text(self.config_text, encoding="utf-8")
            write_manifest(
                folder / "manifest.json",
                config=as_dict,
                device=engine.device,
                argv=arguments,
                resumed_from=resumed_from.name if resumed_from else None,
            )
            self._jsonl = JsonlSink(folder / "metrics.jsonl", resume_step=progress.step)
            self._resources.callback(self._jsonl.close)
        self._tensorboard: TensorBoardSink | None = None
        if self._is_main and config.logger.tensorboard:
            self._tensorboard = TensorBoardSink(folder / "tensorboard", resume_step=progress.step)
            self._resources.callback(self._tensorboard.close)
        # W&B and the bar are there on other ranks too, and silent.
        self.wandb = WandbSink(
            LoggerConfig(**as_dict["logger"] | ({} if self._is_main else {"wandb": "disabled"})),
            run_name=as_dict["run"]["name"],
            run_folder=folder,
            run_config=as_dict,
            run_id=wandb_run_id,
        )
        trainer = config.trainer
        measured = 1.0 if not self._is_main else None  # rank 0's figure is the one that is shown
        self._metrics = StepMetrics(
            flops_per_token=cost.flops_per_token(config.model, trainer.seq_len, adapter_rank=self._adapter_rank),
            peak_flops=trainer.peak_flops or measured or device_peak_flops(engine.device, weight_dtype(trainer.precision)),
            world_size=collectives.size,
        )
        self._plan = estimate_memory(config, ranks=collectives.size, on_gpu=engine.device.type == "cuda")
        self._announce(resumed_from)
        self._bar = self._resources.enter_context(
            progress_bar(total_steps=self._total_steps, done=progress.step, shown=self._is_main),
        )

    def close(self, *, exit_code: int) -> None:
        """Close the files, and the W&B run with `exit_code`."""
        self.wandb.close(exit_code=exit_code)
        self._resources.close()

    # ------------------------------------------------------------------------------------------------------- results
    def step(self, result: StepResult) -> None:
        """Count an update, and record it if its step is one that is logged."""
        self._metrics.add(result)
        self._bar.update()
        if result.spike:
            self._record_batches(result, "loss_spikes.jsonl", "loss spike" + ("" if result.update.applied else ", update skipped"))
        elif not result.update.applied:
            self._record_batches(result, "nonfinite_steps.jsonl", "update skipped")
        elif result.update.skipped_matrices:
            what = f"{result.update.skipped_matrices} matrices left out of the update"
            self._record_batches(result, "nonfinite_steps.jsonl", what)
        if result.update.statistics:
            self._publish(layer_record(result))
        self._compare_with_plan(result.step)
        regular = result.step in (1, self._total_steps) or due(self._config.logger.every_steps, result.step)
        if not regular and result.step != self._resumed_step + 1:
            return
        memory, sources = self._over_ranks(device_memory(self._engine.device), self._loader.stats())
        record = self._metrics.record(
            result, state_bytes=self._engine.state_bytes(), memory=memory, sources=sources, communication=self._engine.communication()
        )
        seconds_left = (self._total_steps - result.step) * (record["time/step_s"] or 0)
        logger.info("%s", step_line(record, total_steps=self._total_steps, seconds_left=seconds_left))
        if regular:  # the first line after a resume is a sign of life on the console; the uninterrupted run has no such record
            self._publish(record)

    def evaluation(self, result: EvalResult, *, seconds: float) -> None:
        """Record an evaluation of the step just done."""
        record = eval_record(self._progress.step, self._progress.tokens, result, seconds=seconds)
        logger.info("%s", eval_line(record, total_steps=self._total_steps))
        self._publish(record)

    def rewind(self, step: int) -> None:
        """Drop the records past `step`, to which the run has gone back."""
        if self._is_main:
            self._jsonl.rewind(step)
        if self._tensorboard:
            self._tensorboard.rewind(step)

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, by rank; JSON-able."""
        return [json.loads(data) for data in self._collectives.gather_bytes(json.dumps(value).encode(), self._engine.device)]

    def _publish(self, record: Record) -> None:
        if self._is_main:
            self._jsonl.write(record)
            self.wandb.write(record)
        if self._tensorboard:
            self._tensorboard.write(record)

    def _over_ranks(self, memory: dict[str, float], sources: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """This rank's memory beside the highest peak of all ranks; counters of the data added up, and the longest wait."""
        if self._collectives.size == 1:
            return memory, sources
        peaks, counters = zip(*self.gather([memory["peak_allocated"], sources]), strict=True)
        added = {name: sum(of_rank.get(name, 0) for of_rank in counters) for name in sources}
        longest = max(of_rank["wait_seconds"] for of_rank in counters)
        return memory | {"peak_allocated_largest": max(peaks)}, added | {"wait_seconds": longest}

    def _record_batches(self, result: StepResult, name: str, what: str) -> None:
        """Say what was wrong with a step, and write the rows and documents of its batches to a file of that name."""
        update = result.update
        identity = {
            "step": result.step,
            "what": what,
            "loss": repr(update.loss),
            "grad_norm": repr(update.grad_norm),
            "batches": list(itertools.chain(*self.gather([batch.identity() for batch in result.batches]))),
        }
        if self._is_main:
            try:
                with (self._folder / name).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(identity) + "\n")
            except OSError as error:
                logger.warning("%s cannot be written: %s", self._folder / name, error)
        logger.warning(
            "step %d: loss %s, gradient norm %s: %s (%d so far)",
            result.step,
            update.loss,
            update.grad_norm,
            what,
            result.loss_spikes if result.spike else result.skipped_steps,
        )

    # ------------------------------------------------------------------------------------------------------- the start
    def _compare_with_plan(self, step: int) -> None:
        """After the first updates, say what the plan was worth: on a GPU, whose allocator counts tensors as the plan does. (The
        resident set of a process on the CPU holds Python, libraries and what was freed as well.)"""
        if self._engine.device.type == "cuda" and step == min(self._resumed_step + FIRST_STEPS, self._total_steps):
            logger.info("%s", against_plan(self._plan, device_memory(self._engine.device)["peak_allocated"]))

    @property
    def _adapter_rank(self) -> int:
        return self._config.optimizer.rank if isinstance(self._config.optimizer, LoRAConfig) else 0

    def _announce(self, resumed_from: Path | None) -> None:
        config, trainer, progress = self._config, self._config.trainer, self._progress
        sizes = self._engine.state_bytes()
        adapters = cost.adapter_parameter_count(config.model, self._adapter_rank)
        logger.info(
            "%s: %s parameters%s, %s on %s, %s | %s steps of %s x %s tokens in micro-batches of %s",
            config.run.name,
            f"{cost.parameter_count(config.model):,}",
            f" and {adapters:,} of adapters" if adapters else "",
            config.optimizer.name,
            self._engine.device,
            trainer.precision,
            f"{self._total_steps:,}",
            trainer.global_batch_size,
            trainer.seq_len,
            trainer.micro_batch_size,
        )
        logger.info(
            "weights %.1f MiB, optimizer state %.1f MiB | run folder %s",
            sizes["weights"] / 2**20,
            sizes["optimizer_state"] / 2**20,
            self._folder,
        )
        logger.info("%s", short_plan(self._plan))
        if resumed_from:
            logger.info("continuing from %s: step %d, %s tokens", resumed_from, progress.step, f"{progress.tokens:,}")
