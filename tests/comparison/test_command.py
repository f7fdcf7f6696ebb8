"""`python -m ngpt.compare` as a user meets it: what it runs, what it does when it is stopped, and what it says at the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ngpt.comparison import process as process_module

ALL = ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]


# ------------------------------------------------------------------------------------------------------- what is run
def test_every_arm_runs_with_every_seed_and_the_verdict_is_of_the_pairs(comparison, capsys):
    comparison.plan(
        a_seed0={"loss": 3.00}, b_seed0={"loss": 2.96, "state": 0.25}, a_seed1={"loss": 3.40}, b_seed1={"loss": 3.35, "state": 0.25},
        a_seed2={"loss": 3.20}, b_seed2={"loss": 3.17, "state": 0.25},
    )  # fmt: skip
    assert comparison("--seeds", "0,1,2") == 0
    assert comparison.starts == [*ALL, "a-seed2", "b-seed2"]
    said = capsys.readouterr().out
    assert said.startswith("2 arms x 3 seeds = 6 runs in out; the time is known once one has finished\n")
    assert re.search(r"\[1/6\] a, seed 0: held-out loss 3.0000 in [\d:]+; about [\d:]+ left for 5 runs", said)
    verdict = "b is better than a by 0.0400 ± 0.0248 nats (95% interval of 3 seeds, paired; standard error 0.0058) with 0.25 of the "
    assert f"{verdict}optimizer state, equal peak memory and equal time a step." in said
    for page in ("out/report.html", "out/report.md"):
        assert "b is better than a by 0.0400 ± 0.0248 nats" in Path(page).read_text()
    assert {run["status"] for run in comparison.runs.values()} == {"done"}


def test_one_seed_says_nothing_of_the_spread(comparison, capsys):
    comparison.plan(b_seed0={"loss": 2.5, "seconds": 0.2})
    assert comparison() == 0
    said = capsys.readouterr().out
    assert "b is ahead of a by 0.5000 nats at equal memory and 2.00 of the time a step; this is one seed, so nothing can be said" in said
    assert "better" not in said


def test_a_difference_within_its_interval_is_not_told(comparison, capsys):
    comparison.plan(b_seed0={"loss": 2.9}, b_seed1={"loss": 3.05})
    assert comparison("--seeds", "0,1") == 0
    assert "No difference can be told between b and a: -0.0250 ± 0.9530 nats (95% interval of 2 seeds" in capsys.readouterr().out


def test_the_overrides_of_a_run_end_with_what_the_comparison_sets(comparison, capsys):
    assert comparison("--dry-run") == 0
    assert not Path("out").exists()
    said = capsys.readouterr().out
    overrides = "data=synthetic trainer.max_steps=4 model=llama_9m optimizer=adamw optimizer.lr=0.002 logger.group=out seed=0"
    assert f"waiting: bash train.sh {overrides} run.dir=out run.name=b-seed0 resume=auto\n" in said
    assert comparison.starts == []


def test_several_values_make_several_arms_without_any_being_named(comparison):
    command = ["data=synthetic", "trainer.max_steps=4", "model=llama_9m", "optimizer=adamw", "optimizer.lr=0.1,0.2", "--to", "sweep"]
    assert comparison._run([*command, "--launcher", "bash train.sh"]) == 0
    assert comparison.starts == ["optimizer.lr=0.1-seed0", "optimizer.lr=0.2-seed0"]


# ------------------------------------------------------------------------------------------------- stopping, going on
def test_the_same_command_runs_nothing_twice_and_takes_up_more_seeds_and_arms(comparison, capsys):
    assert comparison("--seeds", "0") == 0
    assert comparison("--seeds", "0") == 0
    assert comparison.starts == ["a-seed0", "b-seed0"]
    assert "2 runs in out, 2 done; nothing left to run" in capsys.readouterr().out
    more = ["--arm", "a", "optimizer.lr=0.001", "--arm", "b", "optimizer.lr=0.002", "--arm", "c", "optimizer.lr=0.003"]
    assert comparison("--seeds", "0,1", *more) == 0
    assert comparison.starts == ["c-seed0", "a-seed1", "b-seed1", "c-seed1"]
    assert comparison("--seeds", "1") == 0
    assert len(comparison.runs) == 6, "what this command does not name is not forgotten"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGHUP", 75)])
def test_a_signal_is_passed_on_so_that_the_run_saves_and_the_same_command_goes_on(comparison, capsys, name, code):
    comparison.plan(b_seed0={"interrupts": name})
    handler = signal.getsignal(getattr(signal, name))
    assert comparison("--seeds", "0,1") == code
    assert comparison.starts == ["a-seed0", "b-seed0"]
    assert comparison.runs["b-seed0"]["status"] == "stopped"
    said = capsys.readouterr().out
    assert f"{name}: the run saves, then this stops" in said
    assert "the same command goes on" in said
    assert signal.getsignal(getattr(signal, name)) == handler
    assert comparison("--seeds", "0,1") == 0
    assert comparison.starts == ["b-seed0", "a-seed1", "b-seed1"]
    assert comparison.runs["b-seed0"]["starts"] == 2


def test_ctrl_c_in_a_terminal_reaches_the_run_once(comparison):
    comparison.plan(a_seed0={"listens": True})
    with comparison.popen() as process:
        while process.poll() is None and not Path("up").exists():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the session's foreground
        process.communicate()
    assert process.returncode == 130
    assert comparison.runs["a-seed0"]["exit_code"] == 75


def test_a_second_signal_ends_a_run_that_does_not_listen(comparison, capsys):
    comparison.plan(a_seed0={"stubborn": True})
    assert comparison() == 130
    assert comparison.starts == ["a-seed0"]
    run = comparison.runs["a-seed0"]
    assert (run["status"], run["exit_code"]) == ("stopped", -signal.SIGKILL)
    assert run["seconds"] < 30


def test_a_run_that_was_told_to_stop_by_others_stops_the_comparison(comparison):
    comparison.plan(a_seed0={"fails": 75})
    assert comparison() == 75
    assert comparison.starts == ["a-seed0"]


def test_a_comparison_that_is_killed_outright_finds_its_run_again(comparison, capsys, monkeypatch):
    def look(overrides: list[str], left_behind=process_module.left_behind):
        found = left_behind(overrides)
        Path("go").touch()
        return found

    comparison.plan(a_seed0={"waits": True})
    with comparison.popen() as process:
        while process.poll() is None and not Path("starts.txt").exists():
            time.sleep(0.02)
        process.kill()
    monkeypatch.setattr(process_module, "left_behind", look)
    assert comparison() == 0
    assert comparison.starts == ["a-seed0", "b-seed0"], "the run that outlived its comparison is not started a second time"
    assert re.search(r"process \d+ still trains it, left by a comparison that was killed", capsys.readouterr().out)


def test_two_comparisons_do_not_share_a_folder(comparison, capsys):
    comparison.plan(a_seed0={"waits": True})
    with comparison.popen() as process:
        while process.poll() is None and not Path("starts.txt").exists():
            time.sleep(0.02)
        assert comparison() == 2
        assert "already" in capsys.readouterr().err
        Path("go").touch()
        process.communicate()
    assert process.returncode == 0


# ------------------------------------------------------------------------------------------------------------ failures
def test_a_run_that_fails_is_reported_and_the_others_go_on(comparison, capsys):
    comparison.plan(a_seed0={"fails": 2, "says": "1 problem in the configuration:\n  x = 1: too small; write 2"}, a_seed1={"loss": 2.0})
    assert comparison("--seeds", "0,1") == 2
    assert comparison.starts == ALL
    said = capsys.readouterr().out
    assert re.search(r"a, seed 0: failed with exit code 2 in [\d:]+: 1 problem in the configuration: x = 1: too small; write 2\n", said)
    assert "the others go on; the same command tries it again; all that it said is in out/a-seed0.stderr" in said
    assert "b is behind a by 1.0000 nats" in said, "the seed of which both have finished still counts"
    assert "a, seed 0, failed and is not in these figures: 1 problem in the configuration" in said
    comparison.plan()
    assert comparison("--seeds", "0,1") == 0
    assert comparison.starts == ["a-seed0"]
    assert not list(Path("out").glob("*.stderr"))


def test_a_run_that_diverged_is_a_result_and_not_tried_again(comparison, capsys):
    comparison.plan(b_seed0={"fails": 3, "says": "Traceback (most recent call last):\n  File\nTrainingDiverged: ten in a row"})
    assert comparison() == 3
    assert comparison() == 3
    assert comparison.starts == ["a-seed0", "b-seed0"]
    said = capsys.readouterr().out
    assert re.search(r"diverged \(exit code 3\) in [\d:]+: TrainingDiverged: ten in a row\n", said)
    assert "b and a cannot be compared" in said
    assert "1 done, 1 diverged" in said


def test_a_run_that_is_killed_by_the_system_is_named_and_tried_again(comparison, capsys):
    comparison.plan(a_seed0={"killed": True})
    assert comparison() == 1
    assert "a, seed 0: killed by SIGKILL" in capsys.readouterr().out
    assert comparison() == 0
    assert comparison.starts == ["a-seed0", "b-seed0", "a-seed0"]


def test_a_run_that_ends_without_its_last_evaluation_does_not_count(comparison, capsys):
    comparison.plan(a_seed0={"stops_at": 3})
    assert comparison() == 1
    assert re.search(r"ended without a result in [\d:]+: out/a-seed0: it is at step 3 of 4\n", capsys.readouterr().out)


def test_arms_that_in_truth_trained_on_different_tokens_are_found_out(comparison, capsys):
    comparison.plan(a_seed0={"tokens": 255})
    assert comparison() == 0
    assert "The arms trained on different numbers of tokens (a 255, b 256): what is said of them does not hold." in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ mistakes
def test_an_arm_cannot_change_its_settings_within_a_folder(comparison, capsys):
    assert comparison() == 0
    assert comparison("--arm", "a", "optimizer.lr=0.001", "--arm", "b", "optimizer.lr=0.5") == 2
    assert "--arm = b: out has runs of this name with optimizer.lr = 0.002; give the arm another name" in capsys.readouterr().err
    assert comparison("--arm", "a", "optimizer.lr=0.001", "checkpoint.keep=1", "--arm", "b", "optimizer.lr=0.002") == 0
    assert comparison.starts == ["a-seed0", "b-seed0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "a"], "a is no list of whole numbers; write --seeds 0,1,2"),
        (["--baseline", "bb"], "--baseline = bb: no arm has this name; choose from a, b"),
        (["--launcher", "no-such-program -n 2"], "there is no program no-such-program here"),
        (["--allow-different", "token"], "token is not one of the choices; did you mean tokens?"),
        (["--table", "c4"], "--table = c4: makes the arms itself"),
        (["--sizes", "60m"], "add --table c4"),
        (["--sede", "1"], "--sede: no such option; did you mean --seeds?"),
    ],
)
def test_a_mistake_is_answered_before_anything_starts(comparison, capsys, arguments, said):
    try:
        code = comparison(*arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert comparison.starts == []
    assert not Path("out").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(comparison, capsys):
    Path("out").mkdir()
    Path("out/comparison.json").write_text('{"version": 7}')
    assert comparison() == 2
    assert "its comparison.json is not one of this program" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- the table
def test_the_published_table_is_laid_out_with_ours_beside_it(comparison, capsys):
    toy = ["data=synthetic", "tokenizer.path=null", "model=llama_9m", "trainer.max_steps=4", "scheduler.warmup_steps=0"]
    options = ["--table", "c4", "--methods", "adamw,galore", "--sizes", "60m,130m", "--to", "table", "--launcher", "bash train.sh"]
    comparison.plan(**{"60m_adamw_seed0": {"protocol": 40.25}, "130m_galore_seed0": {"protocol": 30.5, "state": 0.25}})
    assert comparison._run([*toy, "model.hidden_size=1024", "model.num_attention_heads=8", *options]) == 0
    assert comparison.starts == ["60m-adamw-seed0", "60m-galore-seed0", "130m-adamw-seed0", "130m-galore-seed0"]
    rows = [line.split("|")[1:-1] for line in Path("table/report.md").read_text().splitlines() if line.startswith("| ")]
    table = {cells[0].strip().replace("\\", ""): [cell.strip() for cell in cells[1:]] for cells in rows[:11]}
    assert table["method"] == ["60M", "130M"]
    assert table["Full rank, AdamW, here"] == ["40.25 (1.61G)", "19.50 (1.61G)"]
    assert table["Full rank, AdamW, published (GaLore, arXiv:2403.03507, Table 2)"] == ["34.06 (0.36G)", "25.08 (0.76G)"]
    assert table["GaLore, here"] == ["19.50 (1.61G)", "30.50 (0.81G)"]
    assert table["Natural GaLore, published (arXiv:2410.16029)"] == ["34.10 (0.24G)", "25.00 (0.52G)"]
    said = capsys.readouterr().out
    assert "galore is level with adamw by 0.0000 nats at equal memory" in said


def test_a_table_of_what_there_is_no_experiment_for_is_refused(comparison, capsys):
    assert comparison._run(["--table", "c4", "--sizes", "65m", "--methods", "adamw,galor"]) == 2
    error = capsys.readouterr().err
    assert "--sizes = 65m: conf/experiment has no c4_SIZE_METHOD of it; choose from 60m, 130m, 350m, 1b" in error
    assert "did you mean galore?" in error


# ------------------------------------------------------------------------------------------------------------- real runs
@pytest.mark.slow
def test_real_runs_are_stopped_resumed_and_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    shape = ["vocab_size=64", "hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2"]
    budget = ["max_steps=60", "global_batch_size=4", "micro_batch_size=4", "seq_len=16", "precision=fp32", "device=cpu", "peak_flops=1e12"]
    common = [
        "data=synthetic", "model=llama_9m", *(f"model.{word}" for word in shape), *(f"trainer.{word}" for word in budget),
        "eval.max_tokens=200", "logger.every_steps=1", "checkpoint.every_steps=0",
    ]  # fmt: skip
    arms = ["--arm", "adamw", "optimizer=adamw", "--arm", "galore", "optimizer=galore", "optimizer.rank=4"]
    command = [sys.executable, "-m", "ngpt.compare", *common, *arms, "--to", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step  3/60"))
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == 130, said
    saved = [path.name for path in (tmp_path / "out/adamw-seed0/checkpoints").glob("step-*")]
    assert len(saved) == 1, "the run saved where it was stopped"
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert f"continuing from out/adamw-seed0/checkpoints/{saved[0]}" in done.stdout
    runs = json.loads((tmp_path / "out/comparison.json").read_text())["runs"]
    assert [(run["status"], run["starts"]) for run in runs] == [("done", 2), ("done", 1)]
    assert re.search(r"galore is (ahead of|behind) adamw by \d\.\d{4} nats with 0\.\d\d of the optimizer state", done.stdout)
    assert "different numbers" not in done.stdout
