"""Faults of a run on one process."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ngpt.config.compose import compose_run
from ngpt.config.validate import ConfigError
from ngpt.data.documents import DataError
from ngpt.data.train_loader import TrainLoader
from ngpt.dist.folder_lock import FolderInUse, only_run_in
from ngpt.engine.local import LocalEngine
from ngpt.loop.spikes import SpikeRule
from ngpt.loop.train_loop import TrainingDiverged
from ngpt.out_of_memory import OutOfMemory
from ngpt.run import Run, exit_code_of
from ngpt.telemetry.sinks import JsonlSink
from ngpt.train import train

SPIKES = ["trainer.spike_window=8", "trainer.spike_deviations=4", "eval.every_steps=0", "eval.at_end=false", "scheduler.warmup_steps=0"]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def loss_times_100(monkeypatch):
    """`loss_times_100(n, m, ...)`: the losses of the n-th, m-th, ... update that is tried are a hundred times what they are."""

    def arrange(*updates):
        finish, tried = LocalEngine.finish_update, []

        def finish_with_spike(self, loss, **options):
            tried.append(0)
            return finish(self, loss * (100 if len(tried) in updates else 1), **options)

        monkeypatch.setattr(LocalEngine, "finish_update", finish_with_spike)

    return arrange


# ---------------------------------------------------------------------------------------------------------------- spikes
def test_a_loss_spike_is_logged_and_counted(tiny, loss_times_100, seen):
    """A loss a hundred times those before it, on_spike=log | a warning, train/loss_spikes, the batch's rows on disk; training goes on"""
    loss_times_100(5)
    assert tiny.run(*SPIKES) == 0
    assert [row["train/loss_spikes"] for row in tiny.records()] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert tiny.records()[-1]["optim/skipped_steps"] == 0
    [entry] = [json.loads(line) for line in (tiny.folder / "loss_spikes.jsonl").read_text().splitlines()]
    assert entry["step"] == 5
    assert len(entry["batches"]) == 2
    spikes = tiny.records()[-1]["train/loss_spikes"]
    seen(f"train/loss_spikes {spikes}; step {entry['step']} with {len(entry['batches'])} micro-batches on disk")


@pytest.mark.parametrize("apply", ["deferred", "whole"])
def test_a_loss_spike_is_skipped_before_it_touches_a_weight(tiny, loss_times_100, apply):
    """The same, on_spike=skip | weights are bit for bit those before the step; counted"""
    loss_times_100(5)
    saves = ["checkpoint.every_steps=1", "checkpoint.keep=9"]
    assert tiny.run(*SPIKES, *saves, "trainer.on_spike=skip", f"optimizer.apply={apply}") == 0
    assert same(tiny.weights(4), tiny.weights(5))
    assert not same(tiny.weights(5), tiny.weights(6))
    assert tiny.records()[-1]["optim/skipped_steps"] == 1


@pytest.mark.parametrize("apply", ["deferred", "immediate"])
def test_a_loss_spike_sends_the_run_back_and_on_past_the_offending_batches(tiny, loss_times_100, monkeypatch, seen, apply):
    """The same, on_spike=rollback, also with updates inside backward | back to the last checkpoint, data goes on behind; no step twice"""
    results = []
    record = Run.record

    def look(self, result):
        record(self, result)
        results.append((result.step, result.batches[0].first_row))

    monkeypatch.setattr(Run, "record", look)
    loss_times_100(6)
    settings = [f"optimizer.apply={apply}", f"trainer.micro_batch_size={8 if apply == 'immediate' else 4}"]
    assert tiny.run(*SPIKES, *settings, "checkpoint.every_steps=4", "trainer.on_spike=rollback") == 0
    assert [step for step, _ in results] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert [row for _, row in results] == list(range(0, 80, 8))
    assert [row["step"] for row in tiny.records()] == list(range(1, 9))
    assert tiny.records()[-1]["train/rollbacks"] == 1
    seen(f"steps {[step for step, _ in results]} on rows from {[row for _, row in results]}")


def test_spikes_that_keep_coming_stop_the_run(tiny, loss_times_100):
    """A spike after every rollback, max_rollbacks=2 | the run stops after the second with exit code 3"""
    loss_times_100(6, 8, 10)
    with pytest.raises(TrainingDiverged, match="after 2 rollbacks") as caught:
        tiny.run(*SPIKES, "checkpoint.every_steps=4", "trainer.on_spike=rollback", "trainer.max_rollbacks=2")
    assert exit_code_of(caught.value) == 3


def test_a_run_resumed_after_losses_were_seen_judges_the_next_one_as_if_it_had_not_stopped(tiny, tmp_path, loss_times_100):
    """A stop between the losses that a spike is told by and the spike | the resumed run tells it too, and ends with the same bits"""
    loss_times_100(6, 14)  # the sixth update of both runs
    settings = [*SPIKES, "trainer.on_spike=skip", "scheduler=constant"]  # whose rate does not depend on the length of the run
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert tiny.run(*settings, folder=straight) == 0
    assert tiny.run(*settings, "trainer.max_steps=5", folder=stopped) == 0
    assert tiny.run(*settings, folder=stopped) == 0
    assert [row["train/loss_spikes"] for row in tiny.records(stopped)] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert tiny_losses(tiny, stopped) == tiny_losses(tiny, straight)
    assert same(tiny.weights(8, stopped), tiny.weights(8, straight))


def tiny_losses(tiny, folder):
    return [row["train/loss"] for row in tiny.records(folder)]


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_losses_that_are_not_finite_do_not_blind_the_window(wild, seen):
    """NaN or infinity among the losses that a spike is told by, once or most of the time | the next spike is told all the same"""
    rule, with_wild, without = SpikeRule(window=16, deviations=6, drop=True), [], []
    for number in range(16):
        rule.remember(without, 3 + 0.01 * number)
        rule.remember(with_wild, 3 + 0.01 * number)
        for _ in range(number % 4):
            rule.remember(with_wild, wild)
    assert rule.limit(with_wild) == rule.limit(without)
    seen(f"limit {rule.limit(with_wild):.3f} after losses of 3 to 3.15")


def test_one_nan_does_not_blind_the_window():
    """A NaN among the losses that a spike is told by | the next spike is told all the same; a level that stays is none"""
    rule, losses = SpikeRule(window=16, deviations=6, drop=True), []
    generator = random.Random(0)
    for number in range(16):
        rule.remember(losses, math.nan if number == 9 else 3 + 0.05 * generator.gauss(0, 1))
    assert 3.0 < rule.limit(losses) < 3.6
    for _ in range(12):
        rule.remember(losses, 9.0)
    assert rule.limit(losses) > 9  # a level that stays is no spike


# ------------------------------------------------------------------------------------------------------------------ data
def test_unreadable_data_in_mid_run_saves_the_last_finished_step_first(tiny, tmp_path, monkeypatch, seen):
    """Data that cannot be read in the middle of step 5 | checkpoint of step 4, exit code 2; once mended, the same bits as never broken"""
    assert tiny.run(folder=tmp_path / "straight") == 0
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        take, taken = TrainLoader.__next__, []

        def fail_at_tenth(self):
            taken.append(0)
            if len(taken) == 10:  # the second micro-batch of step 5
                raise DataError("shard-7.jsonl line 12: not JSON")
            return take(self)

        patch.setattr(TrainLoader, "__next__", fail_at_tenth)
        with pytest.raises(DataError, match="line 12") as caught:
            tiny.run(folder=broken)
    assert exit_code_of(caught.value) == 2
    assert (broken / "tiny/checkpoints/latest").read_text() == "step-0000004\n"
    assert tiny.run(folder=broken) == 0
    assert same(tiny.weights(8, broken), tiny.weights(8, tmp_path / "straight"))
    seen(f"{caught.value}; {(broken / 'tiny/train.log').read_text().count('continuing from')} resume, final weights bit-equal")


@pytest.mark.parametrize("end", [MemoryError("no room for a window"), SystemExit(3), KeyError("text")], ids=["memory", "exit", "program"])
def test_a_data_thread_that_dies_of_anything_ends_the_run_with_its_error(tiny, monkeypatch, end):
    """The thread that prepares batches dies, of lack of memory, an exit, an error of the program | the run ends with that; no hang"""
    prepare = TrainLoader._prepare

    def die_at_fifth(self, global_batches):
        for number, prepared in enumerate(prepare(self, global_batches)):
            if number == 4:
                raise end
            yield prepared

    monkeypatch.setattr(TrainLoader, "_prepare", die_at_fifth)
    with pytest.raises((type(end), OutOfMemory)):
        tiny.run()
    assert len(tiny.records()) == 2


def test_a_batch_without_a_single_label_does_no_harm(tiny, monkeypatch):
    """All labels of a step masked | loss 0 and a finite update; weights stay finite"""
    take, taken = TrainLoader.__next__, []

    def mask(self):
        batch = take(self)
        taken.append(0)
        if len(taken) in (5, 6):
            batch.labels.fill_(-100)
            object.__setattr__(batch, "num_label_tokens", 0)
        return batch

    monkeypatch.setattr(TrainLoader, "__next__", mask)
    assert tiny.run() == 0
    assert tiny.records()[2]["train/loss"] == 0.0
    assert all(torch.isfinite(value).all() for value in tiny.weights(8).values())


# ---------------------------------------------------------------------------------------------------------------- folder
def test_a_second_run_in_the_folder_is_refused_by_name(tiny):
    """A second run started in the same run folder | refused, naming process and machine; exit code 2; the first one's files untouched"""
    tiny.folder.mkdir()
    holder = "import sys, time; from pathlib import Path; from ngpt.dist.folder_lock import only_run_in\n"
    holder += "with only_run_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder, str(tiny.folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=rf"process {process.pid} on .*run\.name=") as caught:
            tiny.run()
        assert not (tiny.folder / "metrics.jsonl").exists()
        process.kill()
        process.wait()
    assert exit_code_of(caught.value) == 2
    assert tiny.run() == 0  # the lock of a process that was killed is taken over
    assert f"process {process.pid}" in tiny.log()
    assert not (tiny.folder / "run.lock").exists()


def test_the_lock_of_another_machine_is_kept_while_it_beats_and_taken_over_when_it_stops(tmp_path):
    """A run folder last used on another machine | refused while that one still writes to its lock; taken over when it is silent"""
    lock = tmp_path / "run.lock"
    lock.write_text('{"pid": 7, "host": "elsewhere", "beats": 3}')
    with only_run_in(tmp_path, beat_seconds=0.1):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    lock.write_text('{"pid": 7, "host": "elsewhere", "beats": 3}')
    writer = f'import time; time.sleep(0.5); open({str(lock)!r}, \'w\').write(\'{{"pid": 7, "host": "elsewhere", "beats": 4}}\')'
    with (
        subprocess.Popen([sys.executable, "-c", writer]),
        pytest.raises(FolderInUse, match="process 7 on elsewhere"),
        only_run_in(tmp_path, beat_seconds=1),
    ):
        pass


def test_a_run_folder_that_cannot_be_written_is_refused_at_the_start(tiny, tmp_path):
    """The run folder is a file, or below one | refused at the start, naming run.dir; exit code 2"""
    (tmp_path / "tiny").write_text("a file")
    with pytest.raises(ConfigError, match=r"run\.dir = .*must be a folder that can be written") as caught:
        tiny.run()
    assert exit_code_of(caught.value) == 2


def test_a_run_folder_removed_while_running_is_made_again(tiny, monkeypatch, seen):
    """The run folder is deleted while the run goes on | a warning, log and metrics begin again, the last checkpoint is written"""
    record = Run.record

    def remove(self, result):
        record(self, result)
        if result.step == 4:
            shutil.rmtree(tiny.folder)

    monkeypatch.setattr(Run, "record", remove)
    assert tiny.run("eval.every_steps=0", "eval.at_end=false") == 0
    assert [row["step"] for row in tiny.records()] == [5, 6, 7, 8]
    assert "was removed while the run goes on" in tiny.log()
    assert (tiny.folder / "checkpoints/step-0000008/.complete").exists()
    seen(f"records of steps {[row['step'] for row in tiny.records()]} and the last checkpoint are there")


@pytest.fixture
def as_nobody(tmp_path):
    """A folder of a user who is not root, and the switch to that user and back, as nothing is read-only to root."""
    is_root, folder = os.geteuid() == 0, Path(tempfile.mkdtemp())
    if is_root:
        os.chown(folder, 65534, 65534)

    def switch(on=True):
        if is_root:
            os.seteuid(65534 if on else 0)

    yield SimpleNamespace(folder=folder, switch=switch)
    switch(False)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_of_runs_that_is_read_only_is_refused_at_the_start(tiny, as_nobody):
    """run.dir is read-only (as no root) | refused before the model is built, naming run.dir and the cause; exit code 2"""
    as_nobody.folder.chmod(0o555)
    config = compose_run([*tiny.settings, f"run.dir={as_nobody.folder}"])  # Hydra's files may be root's alone
    as_nobody.switch()
    with pytest.raises(ConfigError, match=r"run\.dir = .*must be a folder that can be written \(Permission denied\)") as caught:
        train(config, [])
    assert exit_code_of(caught.value) == 2


def test_a_run_folder_that_turns_read_only_costs_checkpoints_and_not_the_run(tiny, as_nobody, monkeypatch, seen):
    """The run folder is read-only from step 2 to step 5 (as no root) | the saves in between fail, with a warning; training goes on,
    and the rest is written"""
    record, folder = Run.record, as_nobody.folder / "tiny"

    def turn(self, result):
        record(self, result)
        if result.step in (2, 6):
            for path in (folder, folder / "checkpoints"):
                path.chmod(0o555 if result.step == 2 else 0o755)
                os.chown(path, 65534 if os.geteuid() == 0 else -1, -1)
            as_nobody.switch(result.step == 2)

    monkeypatch.setattr(Run, "record", turn)
    settings = ["checkpoint.every_steps=1", "checkpoint.keep=9", "eval.every_steps=0"]
    assert tiny.run(*settings, folder=as_nobody.folder) == 0
    saved = sorted(int(path.parent.name[-1]) for path in folder.glob("checkpoints/step-*/.complete"))
    assert saved == [1, 6, 7, 8]
    assert [row["step"] for row in tiny.records(as_nobody.folder)] == list(range(1, 9))
    assert "Permission denied" in tiny.log(as_nobody.folder)
    seen(f"checkpoints of steps {saved}; all 8 records")


def test_records_that_the_disk_takes_in_part_are_whole_lines_in_the_end(tmp_path, monkeypatch, seen):
    """A full disk takes half a record, then none, then all; also when the run goes back meanwhile | no record is lost, cut or doubled"""
    sink, write, room = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0), os.write, [9, 0, None]

    def full_disk(file, data):
        left = room.pop(0) if room else None
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:left])

    monkeypatch.setattr(os, "write", full_disk)
    for step in (1, 2, 3):
        sink.write({"step": step, "tokens": step})
    room = [9, 0, None]
    sink.write({"step": 4, "tokens": 4})
    sink.rewind(3)
    sink.write({"step": 4, "tokens": 4})
    sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    seen(f"steps {[json.loads(line)['step'] for line in lines]} in the file")


# ---------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), MemoryError(), RuntimeError("can't allocate memory: 9")],
    ids=["cuda", "python", "cpu"],
)
def test_running_out_of_memory_says_what_takes_how_much_and_what_to_change(tiny, monkeypatch, error):
    """Memory runs out in a step | exit code 2; weights, state and batch in GiB, the step, and settings in the order of effect"""

    def no_memory(self, inputs):
        raise error

    monkeypatch.setattr(LocalEngine, "accumulate", no_memory)
    with pytest.raises(OutOfMemory, match=r"step 1: weights .* GiB; optimizer state .* GiB; activations of 4 x 32 tokens") as caught:
        tiny.run()
    savings = [float(line.partition("about ")[2].split()[0]) for line in str(caught.value).splitlines() if "GiB less" in line]
    assert len(savings) > 3
    assert savings == sorted(savings, reverse=True)
    assert "trainer.micro_batch_size=2" in str(caught.value)
    assert exit_code_of(caught.value) == 2


def test_another_runtime_error_is_left_as_it_is(tiny, monkeypatch):
    """An error of the program | not mistaken for a lack of memory"""

    def broken(self, inputs):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(LocalEngine, "accumulate", broken)
    with pytest.raises(RuntimeError, match="shape mismatch") as caught:
        tiny.run()
    assert type(caught.value) is RuntimeError


# ---------------------------------------------------------------------------------------------------------- clock, bits
def test_a_clock_that_runs_backward_makes_no_negative_time_or_rate(tiny, monkeypatch):
    """The wall clock goes back an hour at every look | times and rates stay positive"""
    now = [1.7e9]

    def backward():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backward)
    assert tiny.run() == 0
    for row in tiny.records():
        assert all(value >= 0 for name, value in row.items() if name.startswith(("time/", "throughput/")) and value is not None)


def test_a_clock_that_jumps_ahead_is_no_hang_and_no_lost_rank(tiny, monkeypatch, seen):
    """The wall clock jumps ahead by a day at every look, hang_seconds=10 | the run ends as always: no clock is asked what hangs"""
    now = [1.7e9]

    def forward():
        now[0] += 86400
        return now[0]

    monkeypatch.setattr(time, "time", forward)
    assert tiny.run("trainer.hang_seconds=10") == 0
    assert tiny.records()[-1]["step"] == 8
    seen(f"step {tiny.records()[-1]['step']} of 8 done, {tiny.records()[-1]['time/step_s']:.3f} s a step")


def test_two_deterministic_runs_agree_bit_for_bit(tiny, tmp_path, monkeypatch):
    """trainer.deterministic=true, twice | the same losses and weights, bit for bit (CPU); the mode is on during the run, off after it"""
    during = []
    record = Run.record

    def look(self, result):
        record(self, result)
        during.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))

    monkeypatch.setattr(Run, "record", look)
    for name in ("one", "two"):
        assert tiny.run("trainer.deterministic=true", folder=tmp_path / name) == 0
    assert set(during) == {(True, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled()
    assert tiny_losses(tiny, tmp_path / "one") == tiny_losses(tiny, tmp_path / "two")
    assert same(tiny.weights(8, tmp_path / "one"), tiny.weights(8, tmp_path / "two"))


def test_a_process_that_hangs_alone_writes_its_stacks_and_ends(tmp_path, tiny, seen):
    """A step that never ends on one process, hang_seconds=10 | stacks in the run folder, exit code 4, the step and the line are named"""
    code = (
        "import sys, time, torch._dynamo; from ngpt.engine.local import LocalEngine; from ngpt.train import main\n"
        "def stuck_here(self, inputs): time.sleep(3600)\n"
        "LocalEngine.accumulate = stuck_here\nmain()"
    )
    settings = [*tiny.settings, "trainer.hang_seconds=10", f"run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, *settings], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 4, done.stderr
    assert "no progress for 10 s (trainer.hang_seconds): step 1, busy in train_step.py" in done.stderr
    seen(done.stderr.strip().splitlines()[-1])
    assert "stuck_here" in (tiny.folder / "stacks.rank-0.log").read_text()
