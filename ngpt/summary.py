"""The last lines of a run: what was done, where it lies, and the command that goes on from there."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from ngpt.checkpoint import store
from ngpt.config.durations import clock
from ngpt.config.redaction import redact_argument
from ngpt.config.schema import RunConfig, steps_in_run
from ngpt.loop.evaluate import EvalResult
from ngpt.loop.train_loop import Progress
from ngpt.telemetry.plot import plot_run

logger = logging.getLogger(__name__)


def summarise(
    config: RunConfig,
    folder: Path,
    progress: Progress,
    *,
    state: str,
    last_eval: EvalResult | None,
    references: dict[str, float],
    go_on: str,
) -> None:
    """Draw the plot and say where things are and how to go on.

    Args:
        state: the word for how the run ended.
        references: perplexities to compare with, by name; `unigram` is named beside the last evaluation.
        go_on: the line that says how.
    """
    picture = folder / "metrics.png"
    try:
        plot_run(folder / "metrics.jsonl", picture, title=config.run.name, references=references)
    except OSError as error:  # a run that is done must not fail because of its picture
        logger.warning("the picture could not be drawn: %s", error)
    logger.info(
        "%s: step %d/%d, %s tokens in %s of training, %d skipped updates",
        state,
        progress.step,
        steps_in_run(config.trainer),
        f"{progress.tokens:,}",
        clock(progress.seconds),
        progress.skipped_steps,
    )
    if last_eval and "unigram" in references:
        unigram = references["unigram"]
        logger.info(
            "held-out perplexity %.2f; a unigram model of the same training tokens: %.2f (%.3f of it)",
            last_eval.perplexity,
            unigram,
            last_eval.perplexity / unigram,
        )
    newest = store.find_newest(folder / "checkpoints")
    logger.info("metrics %s | picture %s | newest checkpoint %s", folder / "metrics.jsonl", picture, newest)
    logger.info("charts of all of it: %s", shlex.join([_interpreter(), "-m", "ngpt.report", str(folder)]))
    logger.info("%s", go_on)


def command(arguments: list[str], *, world_size: int = 1) -> str:
    """The command that starts a run with `arguments`, as a user would type it."""
    if world_size > 1:
        return f"(with the launcher of this run) {shlex.join(['-m', 'ngpt.train', *map(redact_argument, arguments)])}"
    return shlex.join([_interpreter(), "-m", "ngpt.train", *map(redact_argument, arguments)])


def _interpreter() -> str:
    interpreter = Path(sys.executable)
    return str(interpreter.relative_to(Path.cwd())) if interpreter.is_relative_to(Path.cwd()) else "python"


def arguments_for_more(config: RunConfig, arguments: list[str]) -> list[str]:
    """The arguments of a run that is twice as long."""
    trainer = config.trainer
    length = ("trainer.max_tokens", trainer.max_tokens) if trainer.max_tokens else ("trainer.max_steps", steps_in_run(trainer))
    setting, value = length
    assert value is not None
    return [argument for argument in arguments if not argument.startswith(f"{setting}=")] + [f"{setting}={2 * value}"]
