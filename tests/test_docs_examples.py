"""The examples of the pages run as they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.compose import compose_run

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python\n" in path.read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_one_after_the_other(page: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for number, code in enumerate(blocks(page, "python")):
            exec(compile(code, f"{page}, block {number}", "exec"), names)


def test_the_commands_for_galores_users_are_accepted() -> None:
    commands = [line for code in blocks("from_galore.md", "") for line in code.splitlines()]
    assert commands
    for command in commands:
        program, *overrides = command.split("ngpt.train ")
        assert program == "python -m "
        config = compose_run(shlex.split(*overrides), check_files=False)
        assert (config.optimizer.name, config.optimizer.state_dtype) == ("galore", "bf16")
