"""The soak finds what it is there to find: made-up histories with one fault each; and one short soak of a real run."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from bench import soak, soak_checks

ROWS, STEPS = 4, 12


def entry(step, rank=0, **changed):
    """What one of two ranks records of a step: half of its rows."""
    first = (step - 1) * ROWS + rank * ROWS // 2
    sums = [7 * (first + place) for place in range(ROWS // 2)]
    return {"step": step, "tokens": 100 * step, "loss": (1 / step).hex(), "rows": [[first, sums]], "resident": 2**28} | changed


def starts_of(*stretches, ranks=2, change=lambda number, entry: entry):
    """Starts that went on from a step and came to another one."""
    return [
        soak_checks.Start(number, rank, begin, ranks, [change(number, entry(step, rank)) for step in range(begin + 1, end + 1)])
        for number, (begin, end) in enumerate(stretches)
        for rank in range(ranks)
    ]


def stream(skip=()):
    """Batches of a loader that was never interrupted."""
    yield from ((row, [7 * row]) for row in range(10_000) if row not in skip)


def row_problems(history):
    return soak_checks.row_problems(history, stream(), steps=STEPS, rows_a_step=ROWS)


INTERRUPTED = [(0, 5), (4, 4), (4, 9), (8, STEPS)]


# ------------------------------------------------------------------------------------------------------------------- rows
def test_lost_steps_that_are_taken_again_with_the_same_rows_are_no_problem():
    history = soak_checks.surviving_history(starts_of(*INTERRUPTED))
    assert (history.repeated, history.starts, history.problems) == (4, 4, [])
    assert row_problems(history) == []
    assert soak_checks.loss_problems(history, soak_checks.surviving_history(starts_of((0, STEPS)))) == []


def test_a_start_that_goes_on_behind_its_checkpoint_skips_a_step_and_is_found():
    starts = starts_of((0, 5), (4, STEPS))
    for start in starts[2:]:
        del start.steps[0]
    history = soak_checks.surviving_history(starts)
    assert "start 1, rank 0: step 6 came where 5 was due" in history.problems
    assert row_problems(history)


@pytest.mark.parametrize("shift", [1, -1, ROWS])
def test_rows_that_are_skipped_or_repeated_after_a_resume_are_found(shift):
    def moved(number, entry):
        (first, sums), *_ = entry["rows"]
        return entry | {"rows": [[first + shift, sums]]} if number == 3 else entry

    history = soak_checks.surviving_history(starts_of(*INTERRUPTED, change=moved))
    assert "start 3, rank 0: step 9 was not what it had been when it was first taken" in history.problems
    assert any(problem.startswith("step 9 was made of rows") for problem in row_problems(history))


def test_other_tokens_in_the_right_rows_are_found():
    def other(number, entry):
        return entry | {"rows": [[entry["rows"][0][0], [1, 2]]]} if entry["step"] == 11 else entry

    [problem] = row_problems(soak_checks.surviving_history(starts_of(*INTERRUPTED, change=other)))
    assert problem.startswith("step 11 was made of rows [40, 41, 42, 43]...")


def test_a_loss_that_differs_in_its_last_bit_is_found():
    def other(number, entry):
        return entry | {"loss": (1 / 10 + 2**-56).hex()} if entry["step"] == 10 else entry

    history = soak_checks.surviving_history(starts_of(*INTERRUPTED, change=other))
    found = soak_checks.loss_problems(history, soak_checks.surviving_history(starts_of((0, STEPS))))
    assert [problem.split(":")[0] for problem in found] == ["rank 0, step 10", "rank 1, step 10"]


def test_a_line_that_a_kill_has_cut_off_does_not_count(tmp_path):
    lines = [json.dumps({"from": 3, "tokens": 300, "ranks": 2}), json.dumps(entry(4)), json.dumps(entry(5))[:30]]
    (tmp_path / "start-0002.rank-1.jsonl").write_text("\n".join(lines))
    [start] = soak_checks.read_starts(tmp_path)
    assert (start.number, start.rank, start.went_on_from, [step["step"] for step in start.steps]) == (2, 1, 3, [4])


# ---------------------------------------------------------------------------------------------------------------- metrics
def write_metrics(path, steps, **changed):
    records = []
    for step in steps:
        records.append({"step": step, "tokens": 100 * step, "train/loss": 1 / step} | changed)
        if step % 5 == 0 or step == STEPS:
            records.append({"step": step, "tokens": 100 * step, "val/loss": 2 / step})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (range(1, STEPS + 1), None),
        ([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12], "steps of training records are not 1, 2, ... 12, each once"),
        ([1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 12], "steps of training records are not 1, 2, ... 12, each once"),
        ([1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 11, 12], "steps go back"),
        ([1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12], "evaluations after [10, 12]..., not after [5, 10, 12]..."),
    ],
)
def test_gaps_and_repetitions_in_the_metrics_are_found(tmp_path, steps, said):
    right, own = write_metrics(tmp_path / "right", range(1, STEPS + 1)), write_metrics(tmp_path / "own", steps)
    found = soak_checks.metrics_problems(own, right, steps=STEPS, every=1, evaluated_every=5)
    assert any(said in problem for problem in found) if said else found == []


def test_another_figure_in_the_metrics_is_found(tmp_path):
    right = write_metrics(tmp_path / "right", range(1, STEPS + 1))
    own = write_metrics(tmp_path / "own", range(1, STEPS + 1), **{"optim/skipped_steps": 1})
    assert len(soak_checks.metrics_problems(own, right, steps=STEPS, every=1, evaluated_every=5)) == STEPS


# ----------------------------------------------------------------------------------------------------------------- memory
def test_memory_that_grows_in_a_process_or_from_start_to_start_is_found():
    def resident(a_step=0, a_start=0):
        def change(number, entry):
            return entry | {"resident": 2**28 + a_step * entry["step"] + a_start * number + entry["step"] % 3 * 4096}

        return starts_of(*[(10 * number, 10 * number + 10_000 // (number + 1)) for number in range(6)], ranks=1, change=change)

    def problems(starts):
        return [problem for of_rank in soak_checks.memory_of(starts) for problem in of_rank.problems()]

    assert problems(resident()) == []
    assert re.fullmatch(r"rank 0: (39|40)\d\d bytes a step more over 10000 steps of one process", problems(resident(a_step=4000))[0])
    assert any("each start began with" in problem for problem in problems(resident(a_start=20 << 20)))


# ------------------------------------------------------------------------------------------------------------------ files
def test_what_is_left_behind_or_missing_is_found(tmp_path):
    for name in ("own", "right"):
        (tmp_path / name / "checkpoints/step-0000012").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "right/checkpoints/step-0000012").rename(tmp_path / "right/checkpoints/step-0000010")  # kept at other steps
    (tmp_path / "own/stacks.rank-1.log").touch()
    assert soak_checks.rubbish(tmp_path / "own", tmp_path / "right", 2) == []
    (tmp_path / "own/checkpoints/.step-0000011.tmp").mkdir()
    (tmp_path / "right/config.yaml").touch()
    found = soak_checks.rubbish(tmp_path / "own", tmp_path / "right", 2)
    assert ["left behind" in found[0], "is not there" in found[1]] == [True, True]


def test_one_other_bit_in_the_result_is_found(tmp_path):
    for name in ("own", "right"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([1.0, -0.0, float("nan")])}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "state.json").write_text(json.dumps({"progress": {"step": 3, "seconds": len(name)}, "wandb": name}))
    assert soak_checks.result_problems(tmp_path / "own", tmp_path / "right") == []
    save_file({"w": torch.tensor([1.0, 0.0, float("nan")])}, tmp_path / "own/model.safetensors")
    (tmp_path / "own/state.json").write_text(json.dumps({"progress": {"step": 4}}))
    found = soak_checks.result_problems(tmp_path / "own", tmp_path / "right")
    assert found[0] == "model.safetensors: w is not the uninterrupted run's"
    assert found[1].startswith("state.json")


# ---------------------------------------------------------------------------------------------------------------- for real
def test_a_folder_that_is_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        soak.main(["--to", str(tmp_path)])
    assert "is there already; give a new folder" in capsys.readouterr().err


def test_a_wrong_setting_is_refused_before_anything_is_started(tmp_path, capsys):
    assert soak.main(["--to", str(tmp_path / "soak"), "--", "optimizer=adamw", "optimizer.rank=3"]) == 2
    assert "optimizer.rank = 3: not a setting of optimizer=adamw" in capsys.readouterr().err
    assert not (tmp_path / "soak").exists()


@pytest.mark.slow
def test_a_short_soak_of_a_real_run_is_green(tmp_path, capsys):
    assert soak.main(["--quick", "--to", str(tmp_path / "soak")]) == 0
    report = (tmp_path / "soak/report.md").read_text()
    assert report in capsys.readouterr().out
    assert report.count("| yes |") == 9
    assert " 0 interruptions" not in report
