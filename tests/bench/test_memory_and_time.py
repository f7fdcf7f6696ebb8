"""The commands that measure memory and time: at toy size, that they measure what they say and that their tables are whole."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import random
from pathlib import Path

import pytest
import torch

from bench import per_layer_memory, presets, step_time
from bench.contenders import CONTENDERS, construct_all, published
from bench.live_bytes import LiveTensorBytes
from bench.step_time import gap_table, in_turn, measure_gap, measure_refresh, measure_steps, middle, parameters_like, steps_table
from data_prep.train_tokenizer import train_tokenizer
from ngpt.config.schema import ModelConfig

SHAPES = [(24, 24), (24, 40), (40, 24)]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A preset called `toy`; returns the arguments that say so, with text and a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
    (tmp_path / "llama_toy.yaml").write_text(json.dumps({"defaults": ["schema_model"], **sizes}))  # JSON is YAML
    monkeypatch.setattr(presets, "MODELS", tmp_path)
    generator = random.Random(0)
    texts = [" ".join(generator.choices(["river", "copper", "lantern", "orbit", "velvet", "signal"], k=60)) for _ in range(400)]
    with gzip.open(tmp_path / "text.json.gz", "wt") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(texts, 280))
    return ["--size", "toy", "--files", str(tmp_path / "*.json.gz"), "--tokenizer", str(tmp_path / "tokenizer.model"), "--device", "cpu"]


# ----------------------------------------------------------------------------------------------------------------- memory
def test_live_bytes_count_what_is_alive_and_not_views_or_what_was_there_before() -> None:
    before = torch.ones(1000)
    with LiveTensorBytes() as count:
        a = before + 1
        b = a.view(10, 100)[2:]
        assert count.live == 4000
        c = before * 2
        assert count.live == 8000
        del a, b
        before.add_(c)
        assert (count.live, count.peak) == (4000, 8000)


def test_per_layer_updates_hold_one_gradient_at_a_time_and_plain_backward_all() -> None:
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    model_bytes = 4 * (2 * 64 * 32 + 3 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32)
    reduced_bytes = 4 * (2 * 64 * 32 + 3 * (4 * 4 * 32 + 3 * 4 * 48 + 2 * 32) + 32)
    peaks = {mode: per_layer_memory.measure(config, "GaLore", mode, rank=4, rows=1, seq_len=8) for mode in per_layer_memory.MODES}
    assert peaks["plain"].gradients == model_bytes
    assert reduced_bytes <= peaks["deferred"].gradients < reduced_bytes + 4 * 64 * 32
    assert peaks["immediate"].gradients == 4 * 64 * 32
    assert peaks["deferred"].tensors < peaks["plain"].tensors


def test_the_memory_command_prints_a_row_for_each_method_and_mode(toy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    per_layer_memory.main(["--size", "toy", "--rank", "4", "--seq-len", "8"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("|")][2:]
    assert [tuple(cell.strip() for cell in row) for row in rows] == [
        (method, mode) for method in per_layer_memory.METHODS for mode in per_layer_memory.MODES
    ]


# ------------------------------------------------------------------------------------------------------------------- time
def test_all_works_take_their_turn_in_every_repetition_in_changing_order() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = in_turn(works, 20, "cpu")
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20, "c": 20}


def test_the_middle_leaves_out_a_tenth_at_both_ends() -> None:
    assert middle([100.0, *[2.0] * 4, 3.0, *[4.0] * 4, 0.0]) == "3.00 (2.00 to 4.00)"


def test_every_optimizer_of_ours_and_of_torch_takes_steps() -> None:
    names = [name for name in CONTENDERS if name not in ("galore-torch", "apollo-torch")]
    times, missing = measure_steps(SHAPES, 4, names, repetitions=1, dtype=torch.float32, device="cpu")
    assert missing == []
    assert list(times) == names


def test_optimizers_that_share_gradients_do_not_change_them() -> None:
    gradients = [torch.randn(shape) for shape in SHAPES]
    before = [gradient.clone() for gradient in gradients]
    built, _ = construct_all(list(CONTENDERS), lambda: parameters_like(gradients), 4)
    for name, optimizer in built.items():
        optimizer.step()
        assert all(map(torch.equal, gradients, before)), name


def test_what_cannot_be_constructed_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "galore-torch", published("no_such_package", "adamw"))
    monkeypatch.setitem(CONTENDERS, "GaLore", lambda params, rank: torch.optim.SGD(params, lr=-1))
    times, missing = measure_steps(SHAPES, 4, ["AdamW", "galore-torch", "GaLore"], repetitions=1, dtype=torch.float32, device="cpu")
    assert list(times) == ["AdamW"]
    assert "galore-torch: not measured" in missing[0]
    assert "pip install --no-deps no-such-package" in missing[0]
    assert "Invalid learning rate" in missing[1]
    assert [line.count("|") for line in steps_table(times)] == [3, 3, 3]  # no ratio to what was not measured


@pytest.mark.parametrize("name", ["galore-torch", "apollo-torch"])
def test_the_published_optimizers_are_timed_with_projection(name: str) -> None:
    if name.replace("-", "_") not in importlib.metadata.packages_distributions():
        pytest.skip(f"{name} is not installed")
    params = parameters_like([torch.randn(24, 40)])
    optimizer = CONTENDERS[name](params, 4)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].shape == (4, 40)


def test_a_refresh_is_measured_against_the_exact_one() -> None:
    before, grad = torch.randn(2, 24, 40)
    ways = measure_refresh(before, grad, 6, repetitions=2, device="cpu")
    assert ways["svd"][1] == 1
    assert all(0.8 < energy <= 1 + 1e-6 and len(values) == 2 for values, energy in ways.values())


def test_every_step_of_a_gap_is_measured() -> None:
    snapshots = [[torch.randn(shape) for shape in SHAPES] for _ in range(2)]
    times = measure_gap(snapshots, 4, 7, {"staggered": {"stagger": True}}, repetitions=2, device="cpu")
    assert len(times["staggered"]) == 7
    assert "of 7 |" in list(gap_table(times))[-1]
    assert list(gap_table({"x": [1.0, 1.0, 3.0, 1.0, 2.0]}))[-1] == "| x | 1000.0 | 1.60 | 2.00 | 3.00 | 1.00 | 1 of 5 |"


@pytest.mark.parametrize(("part", "rows"), [("steps", 3), ("refresh", 6), ("stagger", 2)])
def test_each_part_prints_its_table(part: str, rows: int, toy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--rank", "4", "--repetitions", "2", "--train-steps", "2", "--gap", "5"]
    step_time.main([part, *toy, *few, "--only", "AdamW", "GaLore", "torch Muon"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + rows
    assert len({line.count("|") for line in lines}) == 1


def test_real_gradients_need_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_time.main(["refresh"])
    assert "needs --files and --tokenizer" in capsys.readouterr().err
