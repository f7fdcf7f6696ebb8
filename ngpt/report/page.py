"""The report of runs as files: `report.html`, one page that needs nothing else, and `report.md`, the same in Markdown."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from ngpt.report.html_writer import html_page
from ngpt.report.markdown_writer import markdown_page
from ngpt.report.parts import Section, Table
from ngpt.report.runs import RunHistory, with_unique_names
from ngpt.report.sections import sections_of

PAGE, MARKDOWN = "report.html", "report.md"
__all__ = ["MARKDOWN", "PAGE", "Section", "Table", "write_report"]


def write_report(runs: Sequence[RunHistory], to: Path, *, title: str, sections: Sequence[Section] = ()) -> Path:
    """Write `report.html` and `report.md` into the folder `to`, which is made, and return the path of the page.

    Args:
        runs: in the order in which they are listed and coloured; names that come twice are told apart by their folders.
        title: heading of the page; any text, as names and settings of runs are: all of it is escaped.
        sections: what stands above the report's own sections: a verdict, a table of means.

    Raises:
        OSError: the files cannot be written.
    """
    everything = [*sections, *sections_of(with_unique_names(runs))]
    to.mkdir(parents=True, exist_ok=True)
    page = to / PAGE
    now = datetime.datetime.now(datetime.timezone.utc)
    about = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of ngpt, reported on {now:%Y-%m-%d %H:%M} UTC"
    for path, writer in ((page, html_page), (to / MARKDOWN, markdown_page)):
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(writer(title, about, everything), encoding="utf-8")
        temporary.replace(path)
    return page
