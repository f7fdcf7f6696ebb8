"""Whole runs, from settings to checkpoint: what is written, and that a run that was stopped continues as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ngpt.checkpoint.store import CheckpointError
from ngpt.config.compose import compose_run
from ngpt.run import Run, TrainingDiverged
from ngpt.train import train

TINY = [
    "model=llama_9m",
    "model.vocab_size=128",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data=synthetic",
    "data.document_tokens=40",
    "data.shuffle_window=8",
    "trainer.seq_len=32",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.max_steps=8",
    "trainer.precision=fp32",
    "trainer.peak_flops=1e9",
    "scheduler.warmup_steps=2",
    "eval.max_tokens=300",
    "eval.every_steps=4",
    "checkpoint.every_steps=0",
    "logger.every_steps=1",
    "run.name=tiny",
]
LOW_RANK = ["optimizer.rank=8", "optimizer.update_proj_gap=3"]
HISTORY = ["optimizer=natural_galore", *LOW_RANK, "optimizer.fisher=history", "optimizer.history=4"]
DIAGONAL = ["optimizer=natural_galore", *LOW_RANK, "optimizer.fisher=diagonal"]
FACTORED = ["optimizer=natural_galore", *LOW_RANK, "optimizer.fisher=factored"]
ADAPTIVE = ["optimizer=adarankgrad", *LOW_RANK, "optimizer.energy=0.5"]  # ranks from 1 to 5, other ones at each refresh
RELORA = ["optimizer=relora", "optimizer.rank=8", "optimizer.merge_every=3", "optimizer.restart_warmup_steps=2"]


def run_in(folder: Path, *overrides: str) -> int:
    config = compose_run([*TINY, f"run.dir={folder}", *overrides])
    return train(config, [*TINY, *overrides])


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]


def trajectory(folder: Path) -> list[dict]:
    """What must be equal in two runs that are the same: everything but clocks and the memory of the process."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("time/", "throughput/", "memory/", "data/"))}
        for record in records(folder)
    ]


def weights(folder: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return load_file(folder / "tiny" / "checkpoints" / f"step-{step:07d}" / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    """Drawing takes longer than all the rest of a tiny run; one test looks at the picture."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("ngpt.summary.plot_run", lambda *_args, **_kwargs: None)


@pytest.fixture
def draws():
    """Ask for the real picture."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of the run with these overrides that nobody stopped, trained once."""
    folders: dict[tuple[str, ...], Path] = {}

    def folder_of(overrides: list[str]) -> Path:
        key = tuple(overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("straight")
            assert run_in(folders[key], *overrides) == 0
        return folders[key]

    return folder_of


@pytest.fixture
def stop_after(monkeypatch):
    """Send this process a signal once the result of a certain step is recorded."""

    record = Run.record

    def arrange(step: int, number: int = signal.SIGTERM) -> None:

        def record_and_stop(self, result):
            record(self, result)
            if result.step == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Run, "record", record_and_stop)

    return arrange


def test_a_run_writes_what_the_pages_promise(tmp_path, draws):
    assert run_in(tmp_path, "optimizer=natural_galore", *LOW_RANK, "checkpoint.every_steps=3", "checkpoint.keep=2") == 0
    folder = tmp_path / "tiny"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "metrics.png",
        "train.log",
        "checkpoints",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "run-id", "step-0000006", "step-0000008"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["rank"] == 8
    assert json.loads((folder / "manifest.json").read_text())["starts"][0]["config"]["seed"] == 0
    rows = records(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "val/loss" in row] == [4, 8]
    last = [row for row in rows if "train/loss" in row][-1]
    assert last["tokens"] == 8 * 8 * 32
    assert last["memory/weights_gib"] * 2**30 == 4 * sum(value.numel() for value in weights(tmp_path).values())
    parts = sum(value for name, value in last.items() if name.startswith("memory/optimizer_") and name != "memory/optimizer_state_gib")
    assert parts == pytest.approx(last["memory/optimizer_state_gib"])
    log = (folder / "train.log").read_text()
    assert "step 8/8 (100.0%)" in log
    assert "val ppl" in log
    assert "trainer.max_steps=16" in log  # how to go on


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adamw", "optimizer.apply=whole"],
        ["optimizer=adamw", "trainer.precision=bf16"],
        ["optimizer=galore", *LOW_RANK],
        [*HISTORY, "trainer.grad_clip=0.5"],
        [*HISTORY, "optimizer.apply=whole", "trainer.precision=bf16"],
        [*DIAGONAL, "optimizer.embeddings=true", "optimizer.state_dtype=bf16", "trainer.precision=bf16", "trainer.grad_clip=0.5"],
        [*FACTORED, "optimizer.state_dtype=8bit"],
        [*ADAPTIVE, "optimizer.apply=immediate", "trainer.micro_batch_size=8"],
        ["optimizer=natural_galore", *LOW_RANK, "trainer.precision=bf16_master"],
        [
            "optimizer=natural_galore",
            *LOW_RANK,
            "optimizer.apply=immediate",
            "trainer.micro_batch_size=8",
            "trainer.precision=bf16_nearest",
        ],
        ["optimizer=adamw", "data.packing=pad"],
        [*RELORA, "trainer.grad_clip=0.5"],
        [*RELORA, "optimizer.apply=immediate", "trainer.micro_batch_size=8", "trainer.precision=bf16"],
    ],
    ids=lambda overrides: " ".join(overrides).replace("optimizer.", "").replace("trainer.", ""),
)
@pytest.mark.parametrize("stopped_at", [1, 5])
def test_a_run_stopped_by_sigterm_continues_exactly(tmp_path, uninterrupted, stop_after, overrides, stopped_at):
    """SIGTERM in mid-run, then the same command, seven ways of training | weights, losses and evaluations bit-equal to the run that
    nobody stopped"""
    straight, stopped = uninterrupted(overrides), tmp_path
    stop_after(stopped_at)
    assert run_in(stopped, *overrides) == 75
    stop_after(0)
    assert (stopped / "tiny" / "checkpoints" / f"step-{stopped_at:07d}" / ".complete").exists()
    assert run_in(stopped, *overrides) == 0
    assert trajectory(stopped) == trajectory(straight)
    assert_same_weights(stopped, straight)


@pytest.mark.parametrize("stopped_at", [3, 4])
@pytest.mark.parametrize("overrides", [["optimizer=galore", *LOW_RANK], HISTORY, DIAGONAL, ADAPTIVE, RELORA], ids=lambda given: given[-1])
def test_a_run_stopped_before_a_refresh_or_at_an_evaluation_continues_exactly(tmp_path, uninterrupted, stop_after, overrides, stopped_at):
    """New subspaces in updates 1, 4 and 7, merges after 3 and 6, evaluations after 4 and 8."""
    stop_after(stopped_at)
    assert run_in(tmp_path, *overrides) == 75
    stop_after(0)
    assert run_in(tmp_path, *overrides) == 0
    assert trajectory(tmp_path) == trajectory(uninterrupted(overrides))
    assert_same_weights(tmp_path, uninterrupted(overrides))


def test_a_killed_run_goes_back_to_its_checkpoint_and_no_record_comes_twice(tmp_path, monkeypatch):
    """A run dies after its last checkpoint | goes on from there; no record comes twice"""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_in(straight, *LOW_RANK)

    def die(self, result, record=Run.record):
        record(self, result)
        if result.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", die)
        with pytest.raises(KeyboardInterrupt):
            run_in(killed, *LOW_RANK, "checkpoint.every_steps=5")
    assert records(killed)[-1]["step"] == 7
    run_in(killed, *LOW_RANK, "checkpoint.every_steps=5")
    assert trajectory(killed) == trajectory(straight)
    assert_same_weights(killed, straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_other_signals_save_and_tell_themselves_apart(tmp_path, stop_after, number, code):
    """SIGUSR1, SIGINT | a checkpoint, exit codes 75 and 130"""
    stop_after(3, number)
    assert run_in(tmp_path, *LOW_RANK) == code
    assert (tmp_path / "tiny" / "checkpoints" / "latest").read_text() == "step-0000003\n"


@pytest.mark.parametrize("optimizer", [HISTORY, [*DIAGONAL, "optimizer.embeddings=true"]], ids=["history", "diagonal"])
def test_per_layer_updates_equal_plain_backward(tmp_path, optimizer):
    one = [*optimizer, "trainer.micro_batch_size=8"]
    run_in(tmp_path / "whole", *one, "optimizer.apply=whole")
    for apply in ("deferred", "immediate"):
        run_in(tmp_path / apply, *one, f"optimizer.apply={apply}")
        losses, reference = ([row["train/loss"] for row in records(tmp_path / name) if "train/loss" in row] for name in (apply, "whole"))
        assert losses == pytest.approx(reference, abs=1e-5)


def test_accumulation_8_x_1_equals_1_x_8(tmp_path):
    for micro in (1, 2, 8):
        run_in(
            tmp_path / str(micro), "optimizer=adamw", f"trainer.micro_batch_size={micro}", "data.packing=pad"
        )  # rows with unequal numbers of labels
    reference = [row["train/loss"] for row in records(tmp_path / "8") if "train/loss" in row]
    for micro in (1, 2):
        assert [row["train/loss"] for row in records(tmp_path / str(micro)) if "train/loss" in row] == pytest.approx(reference, abs=2e-5)


def test_the_micro_batch_may_change_in_the_middle_of_a_run(tmp_path, stop_after):
    run_in(tmp_path / "straight", "optimizer=adamw")
    stop_after(4)
    run_in(tmp_path / "changed", "optimizer=adamw")
    stop_after(0)
    run_in(tmp_path / "changed", "optimizer=adamw", "trainer.micro_batch_size=2")
    losses, reference = ([row["train/loss"] for row in records(tmp_path / name) if "train/loss" in row] for name in ("changed", "straight"))
    assert losses == pytest.approx(reference, abs=2e-5)
    assert records(tmp_path / "changed")[-1]["tokens"] == records(tmp_path / "straight")[-1]["tokens"]


def test_activation_checkpointing_and_loss_chunks_change_memory_not_numbers(tmp_path):
    run_in(tmp_path / "plain", *LOW_RANK)
    run_in(tmp_path / "lean", *LOW_RANK, "trainer.activation_checkpointing=full", "trainer.loss_chunk_tokens=48")
    losses, reference = ([row["train/loss"] for row in records(tmp_path / name) if "train/loss" in row] for name in ("lean", "plain"))
    assert losses == pytest.approx(reference, abs=1e-5)


def test_the_model_learns(tmp_path):
    run_in(tmp_path, *LOW_RANK, "trainer.max_steps=60", "logger.every_steps=20", "eval.every_steps=0", "optimizer.lr=0.02")
    losses = [row["train/loss"] for row in records(tmp_path) if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.4


def break_gradients(monkeypatch, at_steps):
    """Put a NaN into one gradient of every update whose number is in `at_steps`."""
    steps = Run.steps

    def steps_with_nan(self):
        parameter = self.engine.model.model.layers[0].mlp.up_proj.weight
        parameter.register_hook(lambda grad: grad * float("nan") if self.progress.step + 1 in at_steps else grad)
        return steps(self)

    monkeypatch.setattr(Run, "steps", steps_with_nan)


@pytest.mark.parametrize("apply", ["whole", "deferred"])
def test_a_nan_gradient_skips_the_update_and_leaves_its_batch_on_disk(tmp_path, monkeypatch, apply):
    """NaN in a gradient in steps 1 and 4 | both updates skipped and counted; their rows and documents on disk"""
    break_gradients(monkeypatch, {1, 4})
    assert run_in(tmp_path, *LOW_RANK, f"optimizer.apply={apply}") == 0
    rows = [row for row in records(tmp_path) if "train/loss" in row]
    assert [row["optim/skipped_steps"] for row in rows] == [1, 1, 1, 2, 2, 2, 2, 2]
    assert [row["optim/grad_norm"] is None for row in rows] == [step in (1, 4) for step in range(1, 9)]
    skipped = [json.loads(line) for line in (tmp_path / "tiny" / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in skipped] == [1, 4]
    assert len(skipped[0]["batches"]) == 2
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


@pytest.mark.parametrize("apply", ["whole", "deferred"])
@pytest.mark.parametrize("optimizer", [HISTORY, [*DIAGONAL, "optimizer.state_dtype=8bit"]], ids=["history", "diagonal"])
def test_a_skipped_update_changes_neither_weights_nor_state(tmp_path, monkeypatch, optimizer, apply):
    """NaN in a gradient | weights and optimizer state keep every bit"""
    break_gradients(monkeypatch, {2})
    run_in(
        tmp_path,
        *optimizer,
        f"optimizer.apply={apply}",
        "trainer.max_steps=3",
        "scheduler.warmup_steps=0",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
    )
    before, after = weights(tmp_path, 1), weights(tmp_path, 2)
    assert all(torch.equal(before[name], after[name]) for name in before)
    states = [load_file(tmp_path / f"tiny/checkpoints/step-000000{step}/optimizer-00000-of-00001.safetensors") for step in (1, 2)]
    assert len(states[0]) > 10
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert not all(torch.equal(after[name], value) for name, value in weights(tmp_path, 3).items())


def test_too_many_skipped_updates_stop_the_run(tmp_path, monkeypatch):
    """NaN in the gradient of every step, max_nonfinite_steps=3 | the run stops after the third, with what to change"""
    break_gradients(monkeypatch, set(range(1, 100)))
    with pytest.raises(TrainingDiverged, match="3 times in a row"):
        run_in(tmp_path, *LOW_RANK, "trainer.max_nonfinite_steps=3")
    assert len((tmp_path / "tiny" / "nonfinite_steps.jsonl").read_text().splitlines()) == 3


def test_a_finished_run_is_left_alone_and_can_be_made_longer(tmp_path):
    run_in(tmp_path, *LOW_RANK)
    before = (tmp_path / "tiny" / "metrics.jsonl").read_bytes()
    assert run_in(tmp_path, *LOW_RANK) == 0
    assert (tmp_path / "tiny" / "metrics.jsonl").read_bytes() == before
    assert run_in(tmp_path, *LOW_RANK, "trainer.max_steps=10") == 0
    assert records(tmp_path)[-1]["step"] == 10
    assert "trainer.max_steps: 8 -> 10" in (tmp_path / "tiny" / "train.log").read_text()


def test_tensorboard_has_the_records_of_metrics_jsonl_after_a_resume_too(tmp_path, stop_after):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stop_after(5)
    assert run_in(tmp_path, *LOW_RANK, "logger.tensorboard=true") == 75
    stop_after(0)
    assert run_in(tmp_path, *LOW_RANK, "logger.tensorboard=true") == 0
    events = EventAccumulator(str(tmp_path / "tiny/tensorboard")).Reload()
    for name in ("train/loss", "val/loss", "throughput/tokens_per_sec"):
        expected = [(row["step"], pytest.approx(row[name])) for row in records(tmp_path) if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


def test_a_stop_in_a_step_that_saves_anyway_saves_once(tmp_path, stop_after):
    stop_after(4)
    assert run_in(tmp_path, *LOW_RANK, "checkpoint.every_steps=4") == 75
    assert (tmp_path / "tiny/checkpoints/step-0000004/.complete").exists()


def test_the_first_step_after_a_resume_is_on_the_console_but_adds_no_record(tmp_path, uninterrupted, stop_after):
    sparse = [*LOW_RANK, "logger.every_steps=4"]
    stop_after(5)
    run_in(tmp_path, *sparse)
    stop_after(0)
    run_in(tmp_path, *sparse)
    assert trajectory(tmp_path) == trajectory(uninterrupted(sparse))
    assert "step 6/8" in (tmp_path / "tiny/train.log").read_text()


def test_a_branch_is_a_run_of_its_own_and_starts_from_the_checkpoint(tmp_path):
    run_in(tmp_path, *LOW_RANK, "checkpoint.every_steps=4")
    step_folder = tmp_path / "tiny/checkpoints/step-0000004"
    run_in(tmp_path, *LOW_RANK, f"resume={step_folder}", "run.name=branch")
    states = [json.loads((tmp_path / name / "checkpoints/step-0000008/state.json").read_text()) for name in ("tiny", "branch")]
    assert states[0]["progress"]["tokens"] == states[1]["progress"]["tokens"]
    assert states[0]["wandb"]["run_id"] != states[1]["wandb"]["run_id"]
    ours, theirs = (load_file(tmp_path / name / "checkpoints/step-0000008/model.safetensors") for name in ("tiny", "branch"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_going_back_within_a_run_that_is_further_on_is_refused(tmp_path):
    """resume names a checkpoint of this run that is not the newest | refused, with the way to branch off"""
    run_in(tmp_path, *LOW_RANK, "checkpoint.every_steps=4")
    with pytest.raises(CheckpointError, match=r"newer step-0000008.*run\.name="):
        run_in(tmp_path, *LOW_RANK, f"resume={tmp_path}/tiny/checkpoints/step-0000004")
    with pytest.raises(CheckpointError, match="resume = never"):
        run_in(tmp_path, *LOW_RANK, "resume=never")
