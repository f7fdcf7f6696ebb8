"""`--help` of every command: there, with examples that can be copied, and without side effects."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from ngpt.config import command_line

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD_STEPS = {"ngpt.config.reference"}  # a step of `make docs`, not a command of users


def commands() -> list[str]:
    """Every module that can be run with `python -m`."""
    files = [*(REPOSITORY / "ngpt").rglob("*.py"), *(REPOSITORY / "data_prep").glob("*.py")]
    runnable = [file for file in files if '\nif __name__ == "__main__":\n' in file.read_text(encoding="utf-8")]
    names = {".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__main__") for file in runnable}
    return sorted(names - BUILD_STEPS)


def run(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    name = f"{command}.__main__" if (REPOSITORY / command.replace(".", "/")).is_dir() else command
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_commands_are_found():
    assert {"ngpt.train", "ngpt.checkpoint", "data_prep.tokenize"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_help_of_every_command_shows_examples_and_leaves_nothing_behind(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, text, errors = run(command, ["--help"], monkeypatch, capsys)
    assert (code, errors) == (0, "")
    examples = text.lower().partition("examples")[2]
    assert f"python -m {command}" in examples, text
    assert "\x1b" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [name for name in commands() if name not in {"ngpt.train", "ngpt.plan"}])
def test_every_command_answers_a_misspelt_option(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(command, ["--hepl"], monkeypatch, capsys)
    assert code == 2
    assert "Traceback" not in errors
    assert "did you mean --help?" in errors or "--help shows all options" in errors


def test_no_command_makes_a_parser_of_its_own():
    """One parser for all: what it does about mistakes holds everywhere."""
    own = Path(command_line.__file__)
    for file in [*(REPOSITORY / "ngpt").rglob("*.py"), *(REPOSITORY / "data_prep").glob("*.py")]:
        assert file == own or "ArgumentParser(" not in file.read_text(encoding="utf-8"), file
