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


README = (CONF_DIR.parent / "README.md").read_text(encoding="utf-8")


def gigabytes_of(experiment: str, *overrides: str) -> float:
    config = compose_run([f"experiment={experiment}", *overrides], check_files=False)
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


@pytest.mark.parametrize(("size", "rank"), [("60m", 128), ("130m", 256), ("350m", 256), ("1b", 512)])
def test_the_memory_in_the_readme_is_what_is_allocated(size, rank):
    row = re.search(rf"^\| {size.upper()}, rank {rank} \| (.*) \|$", README, re.MULTILINE)
    assert row is not None
    natural = f"c4_{size}_natural_galore"
    counted = [
        gigabytes_of(f"c4_{size}_adamw"),
        gigabytes_of(f"c4_{size}_galore"),
        gigabytes_of(natural),
        gigabytes_of(natural, f"optimizer.rank={rank // 4}", "optimizer.embeddings=true"),
        gigabytes_of(natural, "optimizer=natural_galore_paper"),
    ]
    assert [float(cell) for cell in row[1].split(" | ")] == pytest.approx(counted, abs=0.005001)
