"""The example that trains any module runs as it is, in twenty lines, and learns."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "train_any_module.py"


def test_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    runpy.run_path(str(EXAMPLE))
    torch.random.set_rng_state(state)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1


def test_the_example_has_twenty_lines() -> None:
    assert sum(bool(line.strip()) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 20
