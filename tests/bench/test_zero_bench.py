"""The command that compares ZeRO with DeepSpeed's own: at toy size, that it counts what it says and that its tables are whole."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from bench import presets, zero
from bench.wire_bytes import WireBytes
from bench.zero_contenders import OURS, PEER, Ours, Setup, construct, discard
from bench.zero_measurement import Measured, gradient_peaks, matrix_bytes_sent
from ngpt.config.schema import ModelConfig
from ngpt.dist.collectives import Collectives

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
MATRICES = 2 * (4 * 32 * 32 + 3 * 32 * 48)
RANK = 4
THIN = 2 * RANK * (4 * 32 + 3 * 48)


def setup(stage: int, **options: Any) -> Setup:
    return Setup(ModelConfig(**SIZES), stage, RANK, rows=1, seq_len=8, **options)


# ---------------------------------------------------------------------------------------------------------- in the ranks
def count_each_collective() -> tuple[dict[str, int], int, int]:
    """What is counted at the dispatcher of torch's own calls; then of those of our collectives, and their own count."""
    ranks = Collectives()
    split = [3, 5]
    with WireBytes(ranks) as by_torch:
        dist.all_reduce(torch.ones(6))
        dist.broadcast(torch.ones(10), 0)
        dist.reduce(torch.ones(14), 0)
        dist.reduce_scatter_tensor(torch.empty(18), torch.ones(36))
        dist.all_gather_into_tensor(torch.empty(44), torch.ones(22))
        dist.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
        dist.all_to_all_single(torch.empty(2 * split[ranks.rank]), torch.ones(8), [split[ranks.rank]] * 2, split)
        dist.barrier()
    with WireBytes(ranks) as by_ours:
        ranks.sum_(torch.ones(6))
        ranks.start_sum(torch.ones(26)).wait()
        ranks.broadcast_(torch.ones(10))
        ranks.reduce_scatter(torch.ones(2, 18)).wait()
        ranks.all_gather(torch.ones(22))
        ranks.exchange([torch.ones(size) for size in split], [split[ranks.rank]] * 2)
    return dict(by_torch.sent), by_ours.total, ranks.bytes_sent


def losses_and_bytes(name: str, stage: int) -> tuple[list[float], int, int]:
    """Losses of three steps; the bytes of the last, and what our engine says of it."""
    contender = construct(name, setup(stage))
    losses = []
    for _ in range(3):
        contender.weight_bytes_sent({})
        with WireBytes(Collectives()) as wire:
            losses.append(contender.update(contender.backward()))
    said = sum(contender.engine.communication().values()) if isinstance(contender, Ours) else 0
    discard(contender, setup(stage))
    return losses, wire.total, said


def several(functions: list[Callable[[], Any]]) -> list[Any]:
    return [function() for function in functions]


# ------------------------------------------------------------------------------------------------------------------ wire
def test_every_collective_is_counted_by_the_ring_algorithms_whoever_starts_it(on_ranks: Callable[..., list[Any]]) -> None:
    for rank, (sent, of_ours, counted) in enumerate(on_ranks(2, count_each_collective)):
        assert sent == {
            "all-reduce": 4 * 6,
            "broadcast": 20,
            "reduce": 28,
            "reduce-scatter": 72,
            "all-gather": 88 + 16,
            "all-to-all": 4 * (5 if rank == 0 else 3),
        }
        assert of_ours == counted > 0


@pytest.mark.slow
def test_peer_and_ours_take_the_same_steps_and_what_is_sent_is_what_the_engine_says(on_ranks: Callable[..., list[Any]]) -> None:
    cases = [(name, stage) for stage in (1, 3) for name in (PEER, "AdamW", "Natural, diagonal")]
    of_ranks = on_ranks(2, several, [functools.partial(losses_and_bytes, *case) for case in cases])
    for stage in (1, 3):
        peer, ours = (cases.index((name, stage)) for name in (PEER, "AdamW"))
        mean = [sum(rank[peer][0][step] for rank in of_ranks) / 2 for step in range(3)]  # DeepSpeed gives each rank's own loss
        assert of_ranks[0][ours][0] == pytest.approx(mean, rel=1e-5)
    for results in of_ranks:
        for (name, _), (_, sent, said) in zip(cases, results, strict=True):
            assert name == PEER or sent == said


@pytest.mark.slow
def test_bytes_of_the_matrices_are_those_of_projected_gradients(on_ranks: Callable[..., list[Any]]) -> None:
    cases = [(PEER, 0), ("GaLore", 0), (PEER, 3), ("GaLore", 1)]
    for results in on_ranks(2, several, [functools.partial(matrix_bytes_sent, name, setup(stage)) for name, stage in cases]):
        peer_at_0, galore_at_0, peer_at_3, galore_at_1 = (steady for _, steady in results)
        few = 1000  # losses, norms, counts, checks of the order in which weights are gathered
        assert peer_at_0 == pytest.approx(4 * MATRICES, abs=few)
        assert peer_at_3 == pytest.approx(2 * MATRICES, abs=few)
        assert galore_at_0 == pytest.approx(4 * THIN, abs=few)
        assert galore_at_1 == pytest.approx(4 * THIN, abs=few)
        at_refresh, steady = results[1]
        assert at_refresh > steady


# --------------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.slow
def test_one_layer_of_full_gradients_is_alive_at_most(on_ranks: Callable[..., list[Any]]) -> None:
    cases = [functools.partial(gradient_peaks, "GaLore", setup(2, apply=apply, gap=2)) for apply in ("deferred", "immediate")]
    for results in on_ranks(2, several, cases):
        for peaks in results:
            assert 0 < peaks.full <= 4 * MATRICES // 2
            assert peaks.full < peaks.tensors


# ------------------------------------------------------------------------------------------------------------------ tables
def test_results_of_ranks_are_joined_by_the_largest() -> None:
    fast, slow = Measured(peak=5, backward=[1.0, 4.0], update=[2.0, 2.0]), Measured(peak=3, backward=[2.0, 3.0], update=[1.0, 3.0])
    joined = zero.of_all_ranks([{"x": vars(fast)}, {"x": vars(slow)}])["x"]
    assert (joined.peak, joined.backward, joined.update, joined.step) == (5, [2.0, 4.0], [2.0, 3.0], [4.0, 7.0])


def test_targets_say_what_is_met_and_what_is_missed() -> None:
    peer = Measured(matrices_sent=1000, backward=[1.0] * 3, update=[1.0] * 3)
    good = Measured(matrices_sent=250, matrices_sent_at_refresh=1250, sharded_state=50, sharded_state_of_all=100, backward=[1.0] * 3)
    good.update = [0.5] * 3
    bad = Measured(matrices_sent=300, matrices_sent_at_refresh=300, sharded_state=60, sharded_state_of_all=100, backward=[1.0] * 3)
    bad.update = [1.5] * 3
    lines = list(zero.targets({1: {PEER: peer, "AdamW": bad, "GaLore": good, "Natural, history": bad}}, 0.25, 2))
    assert zero.wire_ratio(good, peer) == pytest.approx(0.255)
    assert [line.rsplit(": ")[-1] for line in lines] == ["met"] * 3 + ["MISSED"] * 3
    assert not any("AdamW" in line for line in lines)


def test_the_share_of_the_thin_gradients_is_that_of_the_shapes() -> None:
    assert zero.thin_share(ModelConfig(**SIZES), RANK) == pytest.approx(THIN / MATRICES)


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--stages", "0,4"], ["--stages", "x"], ["--gradients", "--device", "cuda"]):
        with pytest.raises(SystemExit):
            zero.main(arguments)
    assert "numbers from 0 to 3" in capsys.readouterr().err


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a preset called `toy`."""
    (tmp_path / "llama_toy.yaml").write_text(json.dumps({"defaults": ["schema_model"], **SIZES}))  # JSON is YAML
    monkeypatch.setattr(presets, "MODELS", tmp_path)
    return ["--model", "toy", "--rank", str(RANK), "--seq-len", "8", "--rounds", "2"]


@pytest.mark.slow
def test_the_command_measures_every_contender_in_processes_of_its_own(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "raw.json"
    zero.main([*toy, "--stages", "2", "--only", "GaLore", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| 2 |")]
    assert [row.split("|")[2].strip() for row in rows] == [PEER, "GaLore"] * 2
    assert len({row.count("|") for row in rows[:2]} | {row.count("|") for row in rows[2:]}) == 2
    assert sum(line.startswith("- stage 2, GaLore") for line in lines) == 3
    raw = json.loads(out.read_text())["2"]
    assert len(raw) == 2
    for results in raw:
        for measured in results.values():
            assert len(measured["update"]) == 2
            assert measured["peak"] > measured["kept"] > measured["state"] > 0


def test_the_command_measures_gradients(
    toy: list[str], on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zero, "on_ranks", lambda size, device, function, *args: on_ranks(size, function, *args))
    zero.main([*toy, "--ranks", "1", "--stages", "1", "--gradients", "--only", "GaLore"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |")]
    assert [tuple(cell.strip() for cell in row.split("|")[2:4]) for row in rows] == [("GaLore", "deferred"), ("GaLore", "immediate")]
    assert all("| met |" in row for row in rows)


def test_names_of_contenders_are_those_of_the_tables() -> None:
    assert set(zero.SUBSPACE_ONLY) < set(OURS)
