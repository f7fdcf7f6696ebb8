"""The examples of the pages run as they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.checkpoint.optimizer_files import write_optimizer
from ngpt.config.compose import compose_run
from ngpt.optim import AdamW

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python\n" in path.read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if kind == language]


@pytest.fixture
def _run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with what the examples read: the optimizer's file of a checkpoint."""
    folder = tmp_path / "runs" / "NAME" / "checkpoints" / "step-0000100"
    folder.mkdir(parents=True)
    optimizer = AdamW([("model.layers.0.mlp.up_proj.weight", torch.nn.Parameter(torch.zeros(2, 3)))])
    write_optimizer(folder, optimizer.state_parts(), rank=0, ranks=1, step=100)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_run_folder")
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
