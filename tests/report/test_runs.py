"""Runs are read back as far as they are there: done, going on, cut off, or with files missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ngpt.report.runs import ReportError, find_runs, read_run


def append(folder: Path, text: str, file: str = "metrics.jsonl") -> None:
    with (folder / file).open("a", encoding="utf-8") as stream:
        stream.write(text)


def test_a_series_has_every_finite_value_at_its_step(write_run) -> None:
    items = [{"step": 1, "m": 2}, {"step": 2, "m": None}, {"step": 3, "other": 1.0}, {"step": 4, "m": "much"}, {"step": 5, "m": 0.5}]
    folder = write_run("a", items)
    append(folder, '{"step": 6, "m": NaN}\n{"step": 7, "m": Infinity}\n')
    run = read_run(folder)
    assert run.series("m") == ([1, 5], [2.0, 0.5])
    assert (run.last("m"), run.last("other"), run.last("nothing")) == (0.5, 1.0, None)
    assert run.series("nothing") == ([], [])
    assert run.notes == []


def test_a_last_line_that_is_half_written_is_no_mistake(write_run, make_records) -> None:
    folder = write_run("a", make_records(50))
    whole = len(read_run(folder).records)
    for cut in ('{"step": 60, "train/loss": 3.', '{"step": 60}'):  # the second one is whole but for the end of its line
        path = folder / "metrics.jsonl"
        before = path.read_text()
        append(folder, cut)
        run = read_run(folder)
        assert (len(run.records), run.notes) == (whole + (cut[-1] == "}"), [])
        path.write_text(before)


def test_broken_lines_in_between_are_left_out_and_said(write_run) -> None:
    folder = write_run("a", [{"step": 1, "m": 1}])
    append(folder, 'no json\n[1, 2]\n{"m": 3}\n{"step": "two"}\n{}, {"step": 8}\n\n{"step": 9, "m": 9}\n')
    run = read_run(folder)
    assert run.series("m") == ([1, 9], [1.0, 9.0])
    assert run.notes == ["5 lines of metrics.jsonl could not be read and left out"]


def test_steps_that_were_done_again_stand_there_once(write_run) -> None:
    run = read_run(write_run("a", [{"step": step, "m": value} for step, value in ((10, 1), (20, 2), (30, 3), (20, 4), (20, 5), (30, 6))]))
    assert run.series("m") == ([10, 20, 20, 20, 30], [1.0, 2.0, 4.0, 5.0, 6.0])


def test_missing_and_broken_files_are_said_and_the_rest_is_read(write_run) -> None:
    folder = write_run("some-run", [{"step": 1, "m": 1}])
    (folder / "config.yaml").unlink()
    (folder / "manifest.json").write_text('{"starts": [')
    run = read_run(folder)
    assert (run.name, run.config, run.starts) == ("some-run", {}, [])
    assert run.notes == ["config.yaml is missing", "manifest.json cannot be read (JSONDecodeError)"]
    (folder / "metrics.jsonl").unlink()
    (folder / "config.yaml").write_text("a list\n")
    assert read_run(folder).notes[0] == "config.yaml is not a mapping"
    assert read_run(folder).notes[-2:] == ["metrics.jsonl is missing", "metrics.jsonl has no records yet"]


def test_events_are_read_from_both_files_in_order_and_once(write_run) -> None:
    folder = write_run("a", [{"step": 1}])
    append(folder, json.dumps({"step": 7, "what": "loss spike"}) + "\n", "loss_spikes.jsonl")
    append(folder, 2 * (json.dumps({"step": 3, "what": "update skipped", "loss": "nan"}) + "\n"), "nonfinite_steps.jsonl")
    assert [(event["step"], event["what"]) for event in read_run(folder).events] == [(3, "update skipped"), (7, "loss spike")]


def test_folders_of_runs_are_searched_in_the_order_of_their_numbers(write_run, tmp_path: Path) -> None:
    for name in ("sweep/run10", "sweep/run2", "sweep/run3", "sweep/more/x"):
        write_run(name, [{"step": 1}])
    (tmp_path / "sweep" / "run2" / "checkpoints" / "inner").mkdir(parents=True)
    runs = find_runs([tmp_path / "sweep" / "run3", tmp_path / "sweep", tmp_path / "sweep" / "run2" / "metrics.jsonl"])
    assert [run.name for run in runs] == ["run3", "x", "run2", "run10"]


def test_names_that_come_twice_are_told_apart(write_run, tmp_path: Path) -> None:
    for place in ("one/a", "two/a", "two/b", "two/c"):
        write_run(place, [{"step": 1}], name="c" if place == "two/b" else None)
    assert [run.name for run in find_runs([tmp_path])] == ["one/a", "two/a", "two/c", "two/c (2)"]


def test_what_is_no_run_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nowhere: no such folder; give the folder of a run"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match=r"no run in it \(a folder with metrics.jsonl\)"):
        find_runs([tmp_path])
    with pytest.raises(ReportError, match=r"no run \(it has none of metrics.jsonl"):
        read_run(tmp_path)
