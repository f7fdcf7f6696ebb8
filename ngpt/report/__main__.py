"""The command that reports on runs: `python -m ngpt.report RUN [RUN...] --to DIR` writes one HTML page and the same in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ngpt.config.command_line import CommandParser, parser
from ngpt.report.page import MARKDOWN, write_report
from ngpt.report.runs import RECORDS, ReportError, RunHistory, find_runs

EXIT_USER_ERROR = 2
_LONGEST_TITLE = 60
EXAMPLES = """
python -m ngpt.report runs/quickstart                       writes runs/quickstart/report/report.html and report.md
python -m ngpt.report runs/adamw runs/natural_galore --to compared
python -m ngpt.report runs --title 'Everything so far'      all runs below a folder, into report/

A run may still be going on: the report shows what there is. The page needs no network and no other file: send it as it is.
exit codes: 0 written, 2 no such run, or a mistake in the options"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        runs = find_runs(options.runs)
        to = options.to or (runs[0].folder / "report" if len(runs) == 1 else Path("report"))
        title = options.title or _title_of(runs)
        page = write_report(runs, to, title=title)
    except ReportError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR
    except OSError as error:
        sys.stderr.write(f"the report cannot be written ({error}); --to DIR names another place\n")
        return EXIT_USER_ERROR
    for run in runs:
        for note in run.notes:
            sys.stderr.write(f"{run.name}: {note}\n")
    sys.stdout.write(f"{page}\n{page.with_name(MARKDOWN)}\n")
    return 0


def _title_of(runs: Sequence[RunHistory]) -> str:
    names = ", ".join(run.name for run in runs)
    return names if len(names) <= _LONGEST_TITLE else f"{len(runs)} runs"


def _parser() -> CommandParser:
    options = parser(
        "Report on runs: one HTML page with charts and tables, and the same tables in Markdown.", EXAMPLES, prog="python -m ngpt.report"
    )
    options.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"folder of a run (with {RECORDS}), or one with runs below it")
    options.add_argument("--to", type=Path, metavar="DIR", help="where to write (default: RUN/report, or ./report for several runs)")
    options.add_argument("--title", help="heading of the page (default: the names of the runs)")
    return options


if __name__ == "__main__":
    sys.exit(main())
