"""The memory that each C4 experiment claims is what its model and optimizer allocate (on the meta device: nothing is)."""

from __future__ import annotations

import re

import pytest
import torch

from ngpt.build import build_optimizer
from ngpt.config.compose import CONF_DIR, compose_run
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import state_bytes

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("c4_*.yaml"))


def gigabytes_of(experiment: str) -> float:
    config = compose_run([f"experiment={experiment}"], check_files=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config.model).to(torch.bfloat16)
        optimizer = build_optimizer(model, config=config.optimizer, precision=config.trainer.precision, seed=0)
    return (sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)["total"]) / 1e9


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_memory_in_the_comment_is_what_is_allocated(experiment):
    text = (CONF_DIR / "experiment" / f"{experiment}.yaml").read_text()
    claim = re.search(r"^# Memory, here: ([\d.]+) GB", text, re.MULTILINE)
    assert claim is not None
    assert float(claim[1]) == pytest.approx(gigabytes_of(experiment), abs=0.005)
