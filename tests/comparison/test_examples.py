"""The commands of docs/compare.md and of --help are accepted as they are printed, and what the page says of the statistics is so."""

from __future__ import annotations

import functools
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from ngpt.comparison import arms
from ngpt.comparison.statistics import t_quantile
from ngpt.config.compose import compose_run
from ngpt.config.schema import RunConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/compare.md").read_text(encoding="utf-8")
COMMAND = runpy.run_module("ngpt.compare")
PRINTED = [
    *(line for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()),
    *(line.strip() for line in COMMAND["EXAMPLES"].replace("\\\n", "").splitlines() if line.strip().startswith("python -m")),
]


@functools.lru_cache
def composed(*overrides: str) -> RunConfig:
    return compose_run(list(overrides), check_files=False)


@pytest.mark.parametrize("line", PRINTED, ids=lambda line: str(PRINTED.index(line)))
def test_a_printed_command_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(arms, "compose_run", lambda overrides: composed(*overrides))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "ngpt.compare"]
    assert COMMAND["main"]([*words[3:], *([] if "--dry-run" in words else ["--dry-run"])]) == 0
    assert capsys.readouterr().out.count("waiting: ") >= 2


def test_the_page_gives_the_widths_of_small_samples() -> None:
    said = re.search(
        r"two seeds the interval is ([\d.]+) standard errors wide on each side, with three ([\d.]+), with five (\d+\.\d)", PAGE
    )
    assert said is not None
    assert [float(width) for width in said.groups()] == [round(t_quantile(0.95, seeds - 1), 1) for seeds in (2, 3, 5)]
