"""The race: what it runs in which order, that nothing is run twice or left half written, and what its report says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import optimizer_race, race_training
from bench.optimizer_race import next_run, sweep_rates
from bench.race_methods import METHODS, Method, Racer
from bench.race_report import markdown, standings, write_report
from bench.race_training import Rows, Settings, build_model, held_out_loss, prepare, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of C4's layout; words differ between them."""
    folder = tmp_path_factory.mktemp("corpus")
    files = []
    for number in range(3):
        texts = [" ".join(f"w{number}{(i * 7 + j * j) % 97}" for j in range(60)) for i in range(40)]
        path = folder / f"part-{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files.append(str(path))
    return files


@pytest.fixture(scope="module")
def folder(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    prepare(folder, corpus, 300, 640)
    return folder


@pytest.fixture
def settings(corpus: list[str], folder: Path) -> Settings:
    return Settings(
        name="adamw",
        method=METHODS["adamw"].to_json(),
        rate=0.004,
        seed=0,
        batch_tokens=64,
        steps=10,
        rest_rate=0.01,
        model="llama_9m",
        vocab_size=300,
        seq_len=16,
        products="fp32",
        compiled=False,
        data=prepare(folder, corpus, 300, 640),
    )


# ---------------------------------------------------------------------------------------------------------------- plan
def run_to_the_end(centres: dict[str, float], loss: Callable[[str, float, int], float]) -> list[tuple[str, float, int]]:
    """The order in which one worker would do all runs."""
    done: dict[tuple[str, float, int], float] = {}
    while run := next_run(centres, [0, 1, 2], lambda *run: done.get(run), set()):
        done[run] = loss(*run)
    return list(done)


def test_a_sweep_whose_best_rate_is_in_the_middle_has_three_rates() -> None:
    rates, best = sweep_rates(1.0, lambda rate: abs(math.log(rate)))
    assert (rates, best) == ([0.625, 1.0, 1.6], 1.0)


def test_a_sweep_goes_on_beyond_the_edge_until_the_best_is_inside() -> None:
    rates, best = sweep_rates(1.0, lambda rate: abs(rate - 2.5))
    assert (rates, best) == ([0.625, 1.0, 1.6, 2.56, 4.1], 2.56)


@pytest.mark.parametrize(("sign", "edge"), [(1, 1.6**-3), (-1, 1.6**3)])
def test_a_sweep_is_extended_at_most_twice(sign: int, edge: float) -> None:
    rates, best = sweep_rates(1.0, lambda rate: sign * rate)
    assert len(rates) == 5
    assert best == pytest.approx(edge, rel=1e-2)


def test_a_rate_that_diverged_is_never_the_best_but_counts_as_done() -> None:
    rates, best = sweep_rates(1.0, lambda rate: math.inf if rate > 0.5 else rate)
    assert best == 0.244
    assert len(rates) == 5


def test_every_method_ends_its_sweep_before_any_runs_further_seeds() -> None:
    order = run_to_the_end({"a": 1.0, "b": 1.0}, lambda name, rate, seed: abs(rate - (1.0 if name == "a" else 2.5)))
    assert [seed for _, _, seed in order] == [0] * 8 + [1, 2, 1, 2]
    assert [name for name, _, _ in order] == ["a"] * 3 + ["b"] * 5 + ["a", "a", "b", "b"]
    assert order[-4:] == [("a", 1.0, 1), ("a", 1.0, 2), ("b", 2.56, 1), ("b", 2.56, 2)]


def test_a_second_worker_is_given_another_run() -> None:
    assert next_run({"a": 1.0}, [0], lambda *run: None, {("a", 0.625, 0)}) == ("a", 1.0, 0)
    assert next_run({"a": 1.0}, [0], lambda *run: None, {("a", 0.625, 0), ("a", 1.0, 0), ("a", 1.6, 0)}) is None


# ---------------------------------------------------------------------------------------------------------------- data
def test_rows_predict_every_token_once_and_come_in_an_order_of_their_seed(folder: Path, settings: Settings) -> None:
    rows = Rows(folder / f"{settings.data}-train.npy", 16)
    inputs, labels = rows.take(torch.arange(rows.count))
    assert torch.equal(inputs.flatten()[1:], labels.flatten()[:-1])
    order = rows.order(3, 2 * rows.count)
    assert torch.equal(order, rows.order(3, 2 * rows.count))
    assert not torch.equal(order, rows.order(4, 2 * rows.count))
    assert torch.equal(order[: rows.count].sort().values, torch.arange(rows.count))


def test_the_last_file_is_held_out_and_the_data_known_by_its_contents(corpus: list[str], tmp_path: Path) -> None:
    stamp = prepare(tmp_path, corpus, 300, 640)
    train_rows, held_out = (Rows(tmp_path / f"{stamp}-{part}.npy", 16) for part in ("train", "held_out"))
    assert held_out.count == 640 // 16
    trained, kept_back = (rows.take(torch.arange(rows.count))[0].numpy().tobytes() for rows in (train_rows, held_out))
    assert kept_back[:512] not in trained
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(corpus[-1]).read_bytes())
    assert prepare(tmp_path, [*corpus[:-1], str(moved)], 300, 640) == stamp
    moved.write_text(moved.read_text() + '{"text": "more"}\n')
    assert prepare(tmp_path, [*corpus[:-1], str(moved)], 300, 640) != stamp


# ----------------------------------------------------------------------------------------------------------------- runs
def test_a_run_learns_repeats_itself_and_reports_what_it_kept(folder: Path, settings: Settings) -> None:
    result = train(settings, folder)
    untrained = held_out_loss(build_model("llama_9m", 300, 16, 0, "fp32"), Rows(folder / f"{settings.data}-held_out.npy", 16))
    assert result["final_loss"] < untrained - 0.1
    assert [tokens for tokens, _ in result["curve"]] == [64 * step for step in range(1, 11)]
    assert result["curve"][-1][1] == pytest.approx(result["final_loss"], abs=1e-6)
    matrices, embeddings, norms = 4 * (4 * 128 * 128 + 3 * 128 * 352), 2 * 300 * 128, 9 * 128
    counters = 8 * (4 * 7 + 2 + 9)
    assert result["matrix_state_bytes"] == 8 * matrices + 8 * 28
    assert result["state_bytes"] == 8 * (matrices + embeddings + norms) + counters
    again = train(settings, folder)
    assert (again["final_loss"], again["curve"]) == (result["final_loss"], result["curve"])


def test_accumulated_micro_batches_are_one_batch(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(replace(settings, steps=3), folder)["final_loss"]
    monkeypatch.setattr(race_training, "_MICRO_BATCH_TOKENS", 16)
    assert train(replace(settings, steps=3), folder)["final_loss"] == pytest.approx(whole, abs=1e-5)


def test_an_update_is_of_the_mean_loss_at_the_scheduled_rate(folder: Path, settings: Settings) -> None:
    method = Method("SGD", 0.5).to_json()
    result = train(replace(settings, name="sgd", method=method, rate=0.5, steps=1, rest_rate=1e-30), folder)
    rows, held_out = (Rows(folder / f"{settings.data}-{part}.npy", 16) for part in ("train", "held_out"))
    model = build_model("llama_9m", 300, 16, 0, "fp32")
    inputs, labels = rows.take(rows.order(0, 4))
    torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p -= 0.5 * p.grad
    assert result["final_loss"] == pytest.approx(held_out_loss(model, held_out), abs=1e-6)


def test_a_run_that_diverges_is_recorded_as_such(folder: Path, settings: Settings) -> None:
    assert train(replace(settings, rate=1e30), folder)["final_loss"] is None


def test_bf16_products_change_gradients_by_about_their_rounding() -> None:
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for products in ("fp32", "bf16"):
        model = build_model("llama_9m", 300, 16, 0, products)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_built_and_updates_every_weight(name: str) -> None:
    if METHODS[name].optimizer == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = build_model("llama_9m", 64, 16, 0, "fp32")
    racer = Racer(METHODS[name].to_json(), model, width=128, rate=0.01, rest_rate=0.02, gap=5)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    (model(tokens[:, :-1], tokens[:, 1:]) / 32).backward()
    racer.step(0.5)
    for key, p in model.named_parameters():
        assert p.isfinite().all(), key
        assert not torch.equal(p, before[key]), key
        assert p.grad is None, key
    assert {group["lr"] for optimizer in racer.optimizers for group in optimizer.param_groups} == {0.005, 0.01}


# ------------------------------------------------------------------------------------------------------------- command
def command(corpus: list[str], out: Path, *arguments: str) -> list[str]:
    size = ["--vocab-size", "300", "--seq-len", "16", "--batch-tokens", "64", "--held-out-tokens", "640"]
    return ["--files", *corpus, "--out", str(out), *size, *arguments]


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_a_missing_method_is_reported(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "absent", Method("NoSuchOptimizer", 0.1))
    arguments = command(corpus, tmp_path, "--steps", "4", "--seeds", "0", "--sweep-points", "1", "--methods", "absent,adamw")
    assert optimizer_race.main(arguments) == 0
    assert "absent is not available: there is no optimizer NoSuchOptimizer" in capsys.readouterr().out
    [file] = tmp_path.glob("runs/*.json")
    assert "| adamw | 0.004 | 1 |" in (tmp_path / "report.md").read_text()
    written = file.stat().st_mtime_ns
    assert optimizer_race.main([*arguments[:-1], "adamw"]) == 0
    assert file.stat().st_mtime_ns == written
    assert "adamw, rate" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_race_that_is_killed_leaves_no_half_file_and_no_worker(corpus: list[str], tmp_path: Path) -> None:
    arguments = command(corpus, tmp_path, "--steps", "1000000", "--seeds", "0", "--methods", "adamw", "--workers", "1")
    race = subprocess.Popen([sys.executable, "-m", "bench.optimizer_race", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        children = Path(f"/proc/{race.pid}/task/{race.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*.log")) or not children.read_text().split():
            assert race.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = [int(pid) for pid in children.read_text().split()]
        race.send_signal(signal.SIGTERM)
        race.wait(60)
    finally:
        race.kill()
        race.wait()
    assert not list(tmp_path.glob("runs/*.json"))
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_an_interrupted_run_writes_nothing(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(race_training, "held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        race_training.main([str(folder), json.dumps(asdict(settings))])
    assert not settings.path(folder).exists()


def test_another_setting_is_another_file(folder: Path, settings: Settings) -> None:
    others = [replace(settings, rest_rate=0.02), replace(settings, seed=1), replace(settings, method=METHODS["adamw_b95"].to_json())]
    assert len({s.path(folder) for s in (settings, *others)}) == 4
    assert Settings(**json.loads(json.dumps(asdict(settings)))).path(folder) == settings.path(folder)


# -------------------------------------------------------------------------------------------------------------- report
def result_of(settings: Settings, loss: float | None, seconds: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {
        "settings": asdict(replace(settings, **changes)),
        "commit": "abc",
        "curve": [] if loss is None else [[64, loss + 1], [128, loss]],
        "final_loss": loss,
        "state_bytes": 4096,
        "matrix_state_bytes": 1536,
        "seconds_per_step": seconds,
        "optimizer_seconds_per_step": 0.25,
    }


def example(settings: Settings) -> list[dict[str, Any]]:
    return [
        result_of(settings, 3.5, rate=0.001),
        result_of(settings, 3.0, rate=0.002),
        result_of(settings, 3.2, rate=0.002, seed=1, seconds=3.0),
        result_of(settings, 3.4, rate=0.002, seed=2, seconds=2.0),
        result_of(settings, 2.9, name="other", rate=0.1, seconds=3.0),
        result_of(settings, None, name="other", rate=0.2),
        result_of(settings, None, name="broken", rate=0.2),
    ]


def test_the_report_has_mean_spread_perplexity_state_and_time_by_loss(settings: Settings) -> None:
    lines = markdown(standings(example(settings))).splitlines()[2:]
    assert lines == [
        "| other | 0.1 | 1 | 2.9000 | 0.0000 | 18.17 | 4 | 1.5 | 1.50 | 250.0 | 0.1: 2.900, 0.2: inf |",
        "| adamw | 0.002 | 3 | 3.2000 | 0.4000 | 24.53 | 4 | 1.5 | 1.00 | 250.0 | 0.001: 3.500, 0.002: 3.000 |",
        "| broken | 0.2 | 1 | inf | nan | inf | 4 | 1.5 | 0.50 | 250.0 | 0.2: inf |",
    ]


def test_the_report_keeps_protocols_apart_and_draws_two_plots_for_each(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "runs").mkdir()
    results = [*example(settings), result_of(settings, 2.0, batch_tokens=128)]
    for number, result in enumerate(results):
        (tmp_path / "runs" / f"{number}.json").write_text(json.dumps(result))
    report = write_report(tmp_path).read_text()
    assert report.count("## ") == 2
    assert "7 runs, commits abc" in report
    assert len(list(tmp_path.glob("loss_*.png"))) == len(list(tmp_path.glob("state_*.png"))) == 2
