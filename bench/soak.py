"""Soak: a small model for many thousand steps, killed at random again and again, must end as the run that nobody touched.

    python -m bench.soak --minutes 30 --to runs/soak --stage 2 -- optimizer=natural_galore checkpoint.asynchronous=true
    python -m bench.soak --quick --to runs/soak-quick

Each start is killed after a random time: kill -9 of one rank, of all ranks or of the launcher, SIGTERM to one rank or to all of them (or to
the launcher, which passes it on), in a step, in a save, in an evaluation or while it starts. Then the same command continues. When the
time is over the run is finished, and the same settings are trained once more without any interruption. What is compared at the end is
in bench/soak_checks.py. Exits with 1 if anything is not as it should be, and writes a report, `report.md`, either way.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import soak_checks as checks
from bench.soak_launch import Launch
from bench.soak_rank import checksums
from data_prep.train_tokenizer import train_tokenizer
from ngpt import build
from ngpt.config.compose import compose_run
from ngpt.config.problems import ConfigError
from ngpt.data.builtin import standard_library_prose
from ngpt.dist.exit_codes import EXIT_PEER_LOST, EXIT_TRY_AGAIN, EXIT_USER_ERROR
from ngpt.dist.ranks import Ranks

NAME = "run"
KEEP = 3
VOCABULARY = 512
ENDLESS = 10_000_000  # steps; the true number is known when the time is over
MOMENTS = {"step": 40, "save": 25, "evaluation": 20, "start": 15}  # of a hundred interruptions
ACTIONS = {"kill one": 40, "kill all": 20, "stop one": 20, "stop all": 20}
SECONDS_FOR_MOMENT = 30  # to wait for a save or an evaluation to begin
SECONDS_TO_END = 150  # after which a rank that should have ended hangs
SECONDS_TO_BEGIN = 300
POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Interruption:
    """What was done to a start, what the ranks (or the launcher) exited with, and how many steps were lost by it."""

    moment: str
    action: str
    codes: tuple[int, ...]
    at: int  # the last step that a rank had taken
    until_dead: float  # seconds until all ranks had ended


class Soak:
    """A run that is interrupted at random, and the checks after every interruption."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.generator = random.Random(options.seed)
        self.folder: Path = options.to
        self.interrupted = self.folder / "interrupted"
        self.straight = self.folder / "straight"
        self.interruptions: list[Interruption] = []
        self.problems: list[str] = []
        self.starts = 0
        self.steps = 0

    # ------------------------------------------------------------------------------------------------------- the run
    def run(self) -> int:
        """Soak, finish, train again without interruptions, compare. Returns the exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.options.data == "builtin":
            texts = (document.text for document in standard_library_prose())
            (self.folder / "tokenizer.model").write_bytes(train_tokenizer(texts, VOCABULARY))
        began = time.monotonic()
        while time.monotonic() - began < 60 * self.options.minutes:
            self.one_start()
        self.steps = self.newest_step() + self.options.last_steps
        self.say(f"{len(self.interruptions)} interruptions; on to the end, step {self.steps}")
        self.soak_seconds = time.monotonic() - began
        self.finish(self.interrupted)
        self.say("the same run again, with no interruptions")
        began = time.monotonic()
        self.finish(self.straight)
        self.straight_seconds = time.monotonic() - began
        self.compare()
        return 1 if self.problems else 0

    def one_start(self) -> None:
        """Start, interrupt, wait for the end, look at what is left."""
        before = self.newest_step()
        launch = self.launch(self.interrupted, ENDLESS)
        moment = self.draw(MOMENTS)
        try:
            moment = self.wait_for(moment, launch)
            action = launch.interrupt(self.draw(ACTIONS), self.generator)
            signalled = time.monotonic()
            codes = launch.wait(SECONDS_TO_END)
        except TimeoutError as error:
            self.problems.append(str(error))
            return
        except BaseException:
            launch.kill()
            raise
        reached = self.last_step(launch.number)
        self.interruptions.append(Interruption(moment, action, codes, reached, time.monotonic() - signalled))
        self.say(f"start {launch.number}: from step {before}, at step {reached} ({moment}): {action}; exit codes {codes}")
        self.look(moment, action, codes, before, reached)

    def wait_for(self, moment: str, launch: Launch) -> str:
        """Wait for the moment to interrupt; where it does not come in time, any step will do. Returns which it became."""
        deadline = time.monotonic() + SECONDS_TO_BEGIN
        if moment == "start":
            time.sleep(self.generator.uniform(0.5, self.options.start_seconds))
            return "start" if not launch.has_steps else "step"
        while not launch.has_steps:
            if launch.ended:
                raise TimeoutError(f"start {launch.number} ended before its first step: {launch.wait(1)}")
            if time.monotonic() > deadline:
                launch.kill()
                raise TimeoutError(f"start {launch.number} took no step within {SECONDS_TO_BEGIN} s")
            time.sleep(0.1)
        time.sleep(self.generator.uniform(*self.options.between))
        deadline = time.monotonic() + SECONDS_FOR_MOMENT
        while moment != "step" and time.monotonic() < deadline:
            if self.is_moment(moment, launch):
                time.sleep(self.generator.uniform(0, 0.02))
                return moment
            time.sleep(POLL_SECONDS)
        time.sleep(self.generator.uniform(0, 0.1))
        return "step"

    def is_moment(self, moment: str, launch: Launch) -> bool:
        text = launch.activity(0)[1]
        if moment == "evaluation":
            return text.startswith("evaluation")
        return text.startswith("saving") or any((self.interrupted / NAME / "checkpoints").glob(".step-*.tmp"))

    def look(self, moment: str, action: str, codes: tuple[int, ...], before: int, reached: int) -> None:
        """What must hold after every single interruption."""
        options, now = self.options, self.newest_step()
        self.problems += checks.checkpoint_problems(self.interrupted / NAME / "checkpoints", keep=KEEP, killed=True)
        if now < before:
            self.problems.append(f"{action} ({moment}): the newest checkpoint was step {before} and is step {now}")
        stopped_politely = action.startswith("SIGTERM") and moment != "start"
        if stopped_politely and now < reached:
            self.problems.append(f"{action} ({moment}): {reached} steps were taken, but step {now} is the last one saved")
        may_lose = options.save_every * (2 if options.asynchronous else 1)
        if moment != "start" and reached - now > may_lose:
            self.problems.append(f"{action} ({moment}): {reached - now} steps were lost, more than {may_lose}")
        if options.launcher == "torchrun":
            return
        if stopped_politely:
            allowed = {EXIT_TRY_AGAIN}
        elif moment == "start":  # before there is anybody who could speak, a signal just ends a process
            allowed = {-signal.SIGKILL, -signal.SIGTERM, EXIT_PEER_LOST, EXIT_TRY_AGAIN, EXIT_USER_ERROR}
        else:
            allowed = {-signal.SIGKILL, EXIT_PEER_LOST}
        if not set(codes) <= allowed:
            self.problems.append(f"{action} ({moment}): exit codes {codes}, not of {sorted(allowed)}; see said-{self.starts - 1:04d}.txt")

    def finish(self, folder: Path) -> None:
        """Train to the last step without an interruption."""
        launch = self.launch(folder, self.steps)
        try:
            codes = launch.wait(None)
        except BaseException:
            launch.kill()
            raise
        if set(codes) != {0}:
            self.problems.append(f"the last start in {folder} exited with {codes}")

    # -------------------------------------------------------------------------------------------------------- settings
    def settings(self, folder: Path, steps: int) -> list[str]:
        """All settings of the run, of which only the folder and the last step ever change."""
        options = self.options
        settings = [
            "model=llama_9m", f"model.vocab_size={VOCABULARY}", "model.hidden_size=32", "model.intermediate_size=48",
            "model.num_hidden_layers=2", "model.num_attention_heads=2", f"data={options.data}", "data.streams=4",
            "optimizer.lr=0.005", "scheduler=constant", "scheduler.warmup_steps=10",
            "trainer.seq_len=32", "trainer.global_batch_size=8", "trainer.micro_batch_size=4", "trainer.precision=fp32",
            "trainer.peak_flops=1e9", "trainer.device=cpu", f"trainer.max_steps={steps}", f"engine.zero_stage={options.stage}",
            "engine.timeout_seconds=60", f"eval.every_steps={options.eval_every}", "eval.max_tokens=8000",
            f"checkpoint.every_steps={options.save_every}", f"checkpoint.keep={KEEP}",
            f"checkpoint.asynchronous={str(options.asynchronous).lower()}", f"logger.every_steps={options.log_every}",
            f"run.dir={folder}", f"run.name={NAME}",
        ]  # fmt: skip
        if "optimizer=adamw" not in options.overrides:
            settings += ["optimizer.rank=8", "optimizer.update_proj_gap=20"]
        settings += [f"tokenizer.path={self.folder / 'tokenizer.model'}"] if options.data == "builtin" else []
        return [*settings, *options.overrides]

    def launch(self, folder: Path, steps: int) -> Launch:
        self.starts += 1
        return Launch(self.options, self.settings(folder, steps), folder / "records", self.starts - 1)

    def draw(self, weights: dict[str, int]) -> str:
        return self.generator.choices(list(weights), list(weights.values()))[0]

    def newest_step(self) -> int:
        """Step of the newest checkpoint that is complete; 0 where there is none."""
        complete = [path for path in checks.step_folders(self.interrupted / NAME / "checkpoints") if (path / ".complete").exists()]
        return int(complete[0].name.removeprefix("step-")) if complete else 0

    def last_step(self, number: int) -> int:
        """The last step that any rank has taken in a start; 0 where none has."""
        return max(
            (start.steps[-1]["step"] for start in checks.read_starts(self.interrupted / "records", number) if start.steps), default=0
        )

    def say(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, flush=True)

    # ---------------------------------------------------------------------------------------------------- the comparison
    def compare(self) -> None:
        """All that is checked at the end, and the report."""
        config = compose_run(self.settings(self.straight, self.steps), world_size=self.options.ranks)
        starts, straight = (checks.read_starts(folder / "records") for folder in (self.interrupted, self.straight))
        history, reference = checks.surviving_history(starts), checks.surviving_history(straight)
        run, other = self.interrupted / NAME, self.straight / NAME
        last = f"checkpoints/step-{self.steps:07d}"
        every, evaluated_every = config.logger.every_steps, config.eval.every_steps
        memory, straight_memory = checks.memory_of(starts), checks.memory_of(straight)
        found = {
            "every start goes on exactly where its checkpoint ends, and repeats lost steps bit for bit": history.problems,
            "each row of the stream exactly once": checks.row_problems(
                history, self.uninterrupted_batches(), steps=self.steps, rows_a_step=config.trainer.global_batch_size
            ),
            "every loss of every step, to the last bit": checks.loss_problems(history, reference),
            "metrics.jsonl without a gap, in order, with the same figures": checks.metrics_problems(
                run / "metrics.jsonl", other / "metrics.jsonl", steps=self.steps, every=every, evaluated_every=evaluated_every
            ),
            "memory does not grow": [problem for of_rank in [*memory, *straight_memory] for problem in of_rank.problems()],
            "checkpoints verify, and no more than are kept": checks.checkpoint_problems(run / "checkpoints", keep=KEEP, killed=False),
            "nothing left behind": [
                *checks.rubbish(run, other, self.options.ranks),
                *checks.rubbish(self.interrupted / "tmp", self.straight / "tmp", self.options.ranks),
            ],
            "weights, optimizer state, generators, progress: bit for bit": checks.result_problems(run / last, other / last),
            "after every interruption: exit codes, checkpoints that verify, nothing lost that was saved": self.problems,
        }
        self.problems = [problem for of_kind in found.values() for problem in of_kind]
        lines = [*self.summary(history, memory, straight_memory), "", "| checked | seen |", "|---|---|"]
        lines += [f"| {what} | {'yes' if not wrong else f'NO: {len(wrong)} problems'} |" for what, wrong in found.items()]
        lines += [f"! {what}: {problem}" for what, wrong in found.items() for problem in checks.shortened(wrong)]
        text = "\n".join(lines) + "\n"
        (self.folder / "report.md").write_text(text)
        print(text, flush=True)

    def summary(self, history: checks.History, memory: list[checks.Memory], straight: list[checks.Memory]) -> Iterator[str]:
        """Figures of the run, as text and tables."""
        config = compose_run(self.settings(self.straight, self.steps), world_size=self.options.ranks)
        yield f"`{' '.join(['python -m bench.soak', *self.options.said])}`"
        yield ""
        tokens = max(steps[self.steps]["tokens"] for steps in history.steps.values() if self.steps in steps) if history.steps else 0
        slowest = max((item.until_dead for item in self.interruptions), default=0.0)
        yield (
            f"{self.soak_seconds / 60:.1f} min with {len(self.interruptions)} interruptions, {self.straight_seconds / 60:.1f} min without; "
            f"{self.options.ranks} ranks, ZeRO stage {self.options.stage}, {config.optimizer.name}, {config.trainer.precision}, "
            f"saves {'in the background' if config.checkpoint.asynchronous else 'at once'}; {self.steps:,} steps, {tokens:,} tokens, "
            f"{history.repeated // max(self.options.ranks, 1):,} steps lost and taken again; all ranks had ended {slowest:.1f} s after "
            "an interruption at the latest."
        )
        yield ""
        counts = Counter((item.action.replace("rank 0", "a rank").replace("rank 1", "a rank"), item.moment) for item in self.interruptions)
        actions = sorted({action for action, _ in counts})
        yield "| interruption, during | " + " | ".join(MOMENTS) + " |"
        yield "|---|" + "---|" * len(MOMENTS)
        for action in actions:
            yield f"| {action} | " + " | ".join(str(counts[action, moment]) for moment in MOMENTS) + " |"
        yield ""
        yield "| resident set | rank | largest, MiB | in one process: steps | MiB per 10,000 steps | starts of the same age | kB a start |"
        yield "|---|---|---|---|---|---|---|"
        for name, of_ranks in (("interrupted", memory), ("uninterrupted", straight)):
            for item in of_ranks:
                yield (
                    f"| {name} | {item.rank} | {item.largest / 2**20:.0f} | {item.steps:,} | {item.a_step * 1e4 / 2**20:+.2f} | "
                    f"{item.starts} | {item.a_start / 1e3:+.1f} |"
                )

    def uninterrupted_batches(self) -> Iterator[tuple[int, list[int]]]:
        """Rows of a loader of one rank from the start of the stream."""
        config = compose_run(self.settings(self.straight, self.steps), world_size=self.options.ranks)
        loader = build.open_train_loader(config, build.open_tokenizer(config), Ranks())
        try:
            yield from map(checksums, loader)
        finally:
            loader.close()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder for the runs, records and report")
    parser.add_argument("--minutes", type=float, default=30.0, help="of interruptions; finishing and the uninterrupted run come on top")
    parser.add_argument("--seed", type=int, default=0, help="of what is done and when")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="of ZeRO, where there are several ranks (default 2)")
    parser.add_argument("--asynchronous", action="store_true", help="save in the background")
    parser.add_argument("--launcher", choices=("plain", "torchrun"), default="plain", help="plain: processes started by this command")
    parser.add_argument("--data", choices=("builtin", "synthetic"), default="builtin")
    parser.add_argument("--between", type=float, nargs=2, default=(10.0, 45.0), metavar="S", help="seconds from first step to interruption")
    parser.add_argument("--start-seconds", type=float, default=15.0, help="in which interruptions of a start come")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--eval-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=1, metavar="STEPS")
    parser.add_argument("--quick", action="store_true", help="one rank, seconds: shows that the command works, not that training does")
    parser.add_argument("overrides", nargs="*", help="further settings of the run, after --: optimizer=galore trainer.precision=bf16")
    options = parser.parse_args(argv)
    options.said = list(sys.argv[1:] if argv is None else argv)
    options.last_steps = 100
    if options.quick:
        options.ranks, options.minutes, options.between, options.data = 1, 0.2, (0.2, 1.0), "synthetic"
        options.save_every, options.eval_every, options.start_seconds, options.last_steps = 10, 15, 3.0, 40
    if options.to.exists():
        parser.error(f"--to {options.to} is there already; give a new folder, so that nothing of another soak is counted")
    options.to = options.to.resolve()
    return options


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    soak = Soak(_arguments(argv))
    try:
        compose_run(soak.settings(soak.straight, ENDLESS), world_size=soak.options.ranks, check_files=False)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    return soak.run()


if __name__ == "__main__":
    sys.exit(main())
