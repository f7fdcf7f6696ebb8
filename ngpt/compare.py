"""The command that compares: `python -m ngpt.compare experiment=quickstart --arm a optimizer.rank=16 --arm b optimizer.rank=32`.

Several arms train on the same tokens in the same order, with several seeds, each run in a process of its own and one after the other.
Kill it at any time: the same command goes on. At the end stands a report with a verdict.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ngpt.comparison.arms import SHARED, Arm, compose_arms, requested
from ngpt.comparison.conduct import Conductor
from ngpt.comparison.ledger import Ledger
from ngpt.comparison.published import TABLES, requests_of_table, table_section
from ngpt.comparison.results import standing
from ngpt.comparison.verdict import sections
from ngpt.config import command_line
from ngpt.config.problems import ConfigError, problem
from ngpt.config.redaction import redact, redact_argument
from ngpt.config.suggest import nearest
from ngpt.dist.exit_codes import EXIT_USER_ERROR
from ngpt.dist.folder_lock import FolderInUse, only_run_in
from ngpt.report.page import Section, Table, write_report

DESCRIPTION = """Train several arms on the same tokens in the same order, with several seeds, and say which is better.
Overrides that stand before the first --arm are those of all arms, as `python -m ngpt.train` takes them."""
EXAMPLES = """
Two optimizers, three seeds each; the first arm is the one that the others are compared with:
  python -m ngpt.compare experiment=quickstart trainer.max_steps=300 --seeds 0,1,2 \\
      --arm adamw experiment=quickstart_adamw --arm galore optimizer=galore --arm natural_galore
Several values make several arms, as in a sweep:
  python -m ngpt.compare experiment=quickstart optimizer.lr=0.005,0.01,0.02 --seeds 0,1
On several processes, by any launcher or script of launch/:
  python -m ngpt.compare experiment=c4_60m_galore tokenizer.path=spiece.model optimizer.lr=0.005,0.01 \\
      --launcher "torchrun --standalone --nproc_per_node 2"
The published table, methods x sizes, with ours beside it:
  python -m ngpt.compare --table c4 --sizes 60m,130m --methods adamw,galore,natural_galore tokenizer.path=spiece.model
See what would run, and stop:
  python -m ngpt.compare experiment=quickstart --arm a optimizer.lr=0.01 --arm b optimizer.lr=0.02 --dry-run

Ctrl-C saves the run in progress and stops (twice: at once); the same command goes on from there. Finished runs are not run again; more arms
and seeds can be added to a folder. It holds comparison.json, report.html, report.md and a folder for each run.

exit codes: 0 all runs are done, 2 a mistake in settings (nothing was started), 75 stopped by SIGTERM after saving, 130 by Ctrl-C;
otherwise that of the first run that failed, as of ngpt.train"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        arms = _arms(options)
        folder = options.to or Path("runs") / ("compare-" + (options.table or "-vs-".join(arm.label for arm in arms)))[:120]
        launcher = _launcher(options.launcher)
        ledger = Ledger(folder, arms, options.seeds)
        conductor = Conductor(folder, arms, ledger, launcher, _say)
        _say(conductor.plan())
        if options.dry_run:
            for run in ledger.runs:
                _say(f"{run.status}: {shlex.join(map(redact_argument, conductor.command(run)))}")
            return 0
        code = 0
        if not options.report:
            folder.mkdir(parents=True, exist_ok=True)
            with only_run_in(folder):
                ledger.write()
                code = conductor.conduct()
        _report(options, folder, arms, ledger)
    except (ConfigError, FolderInUse, OSError) as error:
        sys.stderr.write(f"{redact(str(error))}\n")
        return EXIT_USER_ERROR
    return code


def _parser() -> command_line.CommandParser:
    parser = command_line.parser(DESCRIPTION, EXAMPLES, prog="python -m ngpt.compare")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of all arms: experiment=quickstart trainer.max_steps=300")
    parser.add_argument(
        "--arm", nargs="+", action="append", default=[], metavar=("NAME", "OVERRIDE"), help="an arm and what is its own; once for each"
    )
    parser.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,2", help="each arm is trained with each of them (default 0)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="of the comparison (default runs/compare-ARM-vs-ARM)")
    parser.add_argument("--baseline", metavar="NAME", help="the arm that the others are compared with (default: the first)")
    parser.add_argument("--launcher", default="", metavar="COMMAND", help="what starts each run in place of this Python")
    parser.add_argument(
        "--allow-different", action="append", choices=SHARED, default=[], help="let arms differ in what else they must have in common"
    )
    parser.add_argument("--table", choices=TABLES, help="in place of --arm: all experiments <table>_SIZE_METHOD")
    parser.add_argument("--sizes", type=_words, default=[], metavar="60m,130m", help="of the table (default: all)")
    parser.add_argument("--methods", type=_words, default=[], metavar="adamw,galore", help="of the table (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the commands, start nothing")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of what is there")
    return parser


def _arms(options: argparse.Namespace) -> list[Arm]:
    if options.table and options.arm:
        raise ConfigError([problem("--table", options.table, "makes the arms itself", "leave out --arm, or --table")])
    if not options.table and (options.sizes or options.methods):
        raise ConfigError(["--sizes and --methods choose from a table; add --table c4, or leave them out"])
    table = requests_of_table(options.table, options.sizes, options.methods) if options.table else []
    requests = table or [requested(words) for words in options.arm]
    arms = compose_arms(options.overrides, requests, allow=options.allow_different)
    names = list(dict.fromkeys(arm.name for arm in arms))
    if options.baseline not in (None, *names):
        guess = nearest(options.baseline, names)
        fix = f"did you mean {guess}?" if guess else f"choose from {', '.join(names)}"
        raise ConfigError([problem("--baseline", options.baseline, "no arm has this name", fix)])
    return arms


def _launcher(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError([problem("--launcher", text, f"is no command ({error})", "close the quotes")]) from error
    if words and shutil.which(words[0]) is None:
        raise ConfigError([problem("--launcher", text, f"there is no program {words[0]} here", "give its path, or install it")])
    return words


def _report(options: argparse.Namespace, folder: Path, arms: Sequence[Arm], ledger: Ledger) -> None:
    standings, histories = [], []
    for arm in arms:
        folders = {run.seed: folder / run.name for run in ledger.runs if run.arm == arm.label}
        found, runs = standing(arm, options.seeds, folders.__getitem__)
        standings.append(found)
        histories += runs
    notes = [f"{run.arm}, seed {run.seed}, failed and is not in these figures: {run.said}" for run in ledger.runs if run.status == "failed"]
    waiting = [f"{run.arm}, seed {run.seed}" for run in ledger.runs if run.status not in ("done", "failed")]
    notes += [f"Not finished, and not in these figures: {'; '.join(waiting)}. The same command goes on."] if waiting else []
    said = sections(standings, options.seeds, options.baseline, notes)
    overrides = [[arm.label, shlex.join(map(redact_argument, arm.overrides))] for arm in arms]
    protocol = Section("Arms", [Table(["arm", "overrides"], overrides, numbers=False)])
    table = [table_section(standings)] if options.table else []
    page = write_report(histories, folder, title=f"Comparison: {folder.name}", sections=[*table, *said, protocol])
    for section in [*table, *said]:
        for item in section.content:
            _say(f"\n{_aligned(item)}" if isinstance(item, Table) else f"\n{item}")
    _say(f"\nreport {page} | {folder / 'report.md'}")


def _aligned(table: Table) -> str:
    rows = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([*lines, table.caption] if table.caption else lines)


def _seeds(text: str) -> list[int]:
    try:
        seeds = list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of whole numbers; write --seeds 0,1,2") from None
    if min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text}: a seed is at least 0")
    return seeds


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
