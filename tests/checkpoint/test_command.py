"""`python -m ngpt.checkpoint verify|list|prune RUN`: tables, names of what is broken, exit codes."""

from __future__ import annotations

import pytest
import torch

from ngpt.checkpoint.__main__ import main
from ngpt.checkpoint.integrity import COMPLETE
from ngpt.checkpoint.store import CheckpointStore
from ngpt.dist.collectives import Collectives
from ngpt.optim.state import StatePart


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints of steps 1 to 4."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=9, collectives=Collectives())
    for step in (1, 2, 3, 4):
        store.save(
            step,
            weights=iter([("w", torch.ones(10))]),
            layout={"w": (torch.float32, torch.Size([10]))},
            optimizer={"w/step": StatePart(torch.tensor(step), torch.Size(), 0, 0)},
            random={"torch": torch.zeros(5, dtype=torch.uint8)},
            state={},
        )
    return tmp_path


def flip(run, step):
    path = run / f"checkpoints/step-000000{step}/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def steps(run):
    return sorted(int(path.name[-1]) for path in (run / "checkpoints").glob("step-*"))


def test_verify_reads_all_and_says_so(run, capsys):
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["4", "3", "2", "1"]
    assert all(line.endswith("verified") for line in lines[1:5])


def test_verify_names_what_is_broken_and_exits_with_1(run, capsys):
    path = flip(run, 2)
    assert main(["verify", str(run / "checkpoints")]) == 1
    out = capsys.readouterr().out
    assert f"! {path}: its content is not what was saved" in out
    assert out.count("BROKEN") == 1
    assert main(["verify", str(path.parent)]) == 1
    assert main(["verify", str(run / "checkpoints/step-0000001")]) == 0


def test_list_does_not_read_contents_and_tells_unfinished_from_broken(run, capsys):
    flip(run, 1)
    assert main(["list", str(run)]) == 0
    capsys.readouterr()
    (run / "checkpoints/step-0000003" / COMPLETE).unlink()
    (run / "checkpoints/step-0000002/state.json").write_text("")
    assert main(["list", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:5]] == ["state", "complete", "UNFINISHED", "BROKEN", "complete"]
    assert [line.split()[0] for line in lines[5:]] == ["!", "!"]


def test_prune_keeps_the_newest_good_ones(run, capsys):
    flip(run, 4)
    assert main(["prune", str(run), "--keep", "2"]) == 0
    assert steps(run) == [2, 3, 4]
    assert "step-0000004 does not count" in capsys.readouterr().out


def test_prune_never_removes_the_only_good_one(run):
    for step in (2, 3, 4):
        flip(run, step)
    assert main(["prune", str(run), "--keep", "1"]) == 0
    assert steps(run) == [1, 2, 3, 4]
    flip(run, 1)
    assert main(["prune", str(run), "--keep", "1"]) == 1
    assert steps(run) == [1, 2, 3, 4]


def test_a_dry_run_says_what_would_go_and_removes_nothing(run, capsys):
    assert main(["prune", str(run), "--keep", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would remove") == 3
    assert steps(run) == [1, 2, 3, 4]


def test_prune_leaves_milestones(run):
    assert main(["prune", str(run), "--keep", "1", "--keep-every", "2"]) == 0
    assert steps(run) == [2, 4]


@pytest.mark.parametrize("command", [["verify"], ["list"], ["prune", "--keep", "1"]])
def test_a_folder_without_checkpoints_is_a_mistake(tmp_path, capsys, command):
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert "there are no checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["prune", "x", "--keep", "0"], ["prune", "x"], ["burn", "x"], []])
def test_what_makes_no_sense_is_a_mistake(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_help_of_a_part_has_examples_too(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "python -m ngpt.checkpoint prune runs/c4_60m --keep 2 --dry-run" in capsys.readouterr().out
