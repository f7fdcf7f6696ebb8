"""The tables of docs/distributed.md are what the command prints, and count whole models."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from bench.presets import model_of
from bench.zero_scaling import METHODS, SIZES, layers_of, projected_share, report, wire
from ngpt.engine.zero_cost import Setup, textbook_adamw_bytes
from ngpt.model.cost import parameter_count

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def test_the_document_holds_what_the_command_prints() -> None:
    assert report() in DOCUMENT.read_text(encoding="utf-8"), "put the output of `python -m bench.zero_scaling` in docs/distributed.md"


def test_tables_are_whole() -> None:
    tables = [part.splitlines() for part in report().split("\n\n") if part.startswith("|")]
    assert all(len(table) == 2 + len(METHODS) for table in tables)
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


@pytest.mark.parametrize("size", SIZES)
def test_all_parameters_are_counted(size: str) -> None:
    for method in METHODS:
        layers = layers_of(method, size)
        assert sum(prod(shape) for layer in layers for shape, _ in layer) == parameter_count(model_of(size))
        assert len(layers) == model_of(size).num_hidden_layers + 3
    assert all("rank" in settings for _, settings in layers_of("GaLore", size)[2][:7])


@pytest.mark.parametrize("size", SIZES)
def test_our_adamw_sends_what_the_textbooks_sends(size: str) -> None:
    """But for the counts of ranks with a gradient, the scalars, and padding."""
    for stage in range(4):
        setup = Setup(stage, 8, micro_batches=2)
        textbook = textbook_adamw_bytes(layers_of("AdamW", size), setup)
        assert textbook <= wire("AdamW", size, setup)["total"] <= 1.001 * textbook


@pytest.mark.parametrize("size", SIZES)
def test_the_projected_matrices_of_galore_send_the_share_of_the_rank(size: str) -> None:
    share = layers_of("GaLore", size)[2][0][1]["rank"] / model_of(size).hidden_size
    assert projected_share("GaLore", size, Setup(2, 8)) <= share + 0.02
