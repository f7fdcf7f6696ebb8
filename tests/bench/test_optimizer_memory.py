"""The targets for optimizer state, the count of adapters, and that the recorded tables are what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.optimizer_memory import METHODS, RANKS, Method, largest_history, ratio_to_galore, report, state_of
from bench.presets import model_of
from ngpt.model import lora
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import AdamW, state_bytes
from ngpt.optim.relora import ReLoRA

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "RECORDS.md"
sizes = pytest.mark.parametrize("size", RANKS)


def test_the_records_hold_what_the_command_prints() -> None:
    assert report() in RECORDS.read_text(encoding="utf-8"), "put the output of `python -m bench.optimizer_memory` in bench/RECORDS.md"


@sizes
def test_the_factored_fisher_adds_at_most_a_tenth_to_galores_state(size: str) -> None:
    assert ratio_to_galore("Natural GaLore, factored", size) <= 1.10
    at_a_third_of_the_width = size == "130m"  # the benchmark's rank there; the factor grows with its square
    assert ratio_to_galore("Natural GaLore, factored", size, projected_only=True) <= (1.115 if at_a_third_of_the_width else 1.10)


@sizes
def test_the_diagonal_fisher_needs_two_thirds_of_galores_state_for_the_projected_matrices(size: str) -> None:
    assert ratio_to_galore("Natural GaLore, diagonal", size, projected_only=True) <= 0.65
    assert ratio_to_galore("Natural GaLore, diagonal, `embeddings`", size) <= 0.65  # of all state
    of_all_state = {"60m": 0.93, "130m": 0.84, "350m": 0.78, "1b": 0.72, "7b": 0.66}  # embedding and head keep Adam's two moments
    assert ratio_to_galore("Natural GaLore, diagonal", size) <= of_all_state[size]
    assert ratio_to_galore("Natural GaLore, diagonal, 8-bit", size) <= 0.65


@sizes
def test_eight_bits_need_six_tenths_of_galores_state(size: str) -> None:
    assert ratio_to_galore("GaLore, 8-bit", size) <= (0.61 if size == "7b" else 0.60)  # the bases stay bf16
    assert ratio_to_galore("Natural GaLore, diagonal, 8-bit", size) <= 0.60


@sizes
@pytest.mark.parametrize("fisher", ["history", "two_sided"])
@pytest.mark.parametrize("projected_only", [False, True])
def test_the_largest_history_fits_and_one_more_does_not(size: str, fisher: str, projected_only: bool) -> None:
    largest = largest_history(fisher, size, projected_only=projected_only)
    limit = 1.25 * state_of(METHODS["GaLore"], size, projected_only=projected_only)["total"]

    def total(history: int) -> int:
        return state_of(Method({"fisher": fisher, "history": history}), size, projected_only=projected_only)["total"]

    assert largest == 0 or total(largest) <= limit
    assert total(largest + 1) > limit


def test_adapters_are_counted_as_they_are_trained() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(model_of("60m")).to(torch.bfloat16)
        lora.add_adapters(model, rank=RANKS["60m"], alpha=32.0)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    expected = state_of(METHODS["LoRA, ReLoRA"], "60m")
    assert state_bytes(AdamW(trainable, state_dtype="bf16")) == expected
    triples = [adapter for _, adapter in lora.adapters(model)]
    relora = ReLoRA(trainable, adapters=triples, scale=1.0, merge_every=1000, state_dtype="bf16")
    assert state_bytes(relora)["total"] == expected["total"] + 8 * len(trainable)
