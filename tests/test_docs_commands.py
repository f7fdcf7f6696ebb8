"""Every command of this project that README.md or a page of docs/ prints is one that its program takes: composed, or parsed."""

from __future__ import annotations

import argparse
import dataclasses
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.compose import compose_run
from ngpt.config.schema import GROUPS
from ngpt.config.suggest import settings

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TAKES_OVERRIDES = {"ngpt.train", "ngpt.plan"}
LAUNCHERS = {"torchrun": "-m", "deepspeed": "--module"}
OTHER_PROGRAMS = {"from_hf_trainer.md", "from_torchtitan.md"}
ENDS = {"|", "&&", "||", ">", ">>", "<", ";", "&"}
OPTION = re.compile(r"--\w")
WITHOUT_VALUE = {"--multirun", "--help", "--cfg", "--json"}


@dataclass(frozen=True)
class Command:
    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Without the prompt, variables set for it, a comment, or what comes after a pipe, a redirection or another command."""
        words = shlex.split(self.text, comments=True)
        ends = [number for number, word in enumerate(words) if word in ENDS or word.startswith("2>")]
        words = words[: min(ends, default=len(words))]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        return words


def commands_of(text: str) -> Iterator[str]:
    """The lines of fenced blocks that begin like a command of this project, with the lines that continue them."""
    for language, block in FENCE.findall(text):
        if language in {"python", "yaml", "json", "toml"}:
            continue
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            bare = re.sub(r"^\s*(?:\$ )?((?:[A-Z_]+=\S+ )*)(?:\.venv/bin/)?", r"\1", line)
            if re.match(r"(?:[A-Z_]+=\S+ )*(?:python -m |python docs/|torchrun |deepspeed |bash launch/|make |sbatch )", bare):
                yield from (part for part in bare.split(" && ") if not part.startswith(("source ", "cd ")))


COMMANDS = [Command(page.name, text) for page in PAGES if page.exists() for text in commands_of(page.read_text(encoding="utf-8"))]


class Parsed(Exception):
    """The command line was taken; what the command would do next is for other tests."""


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises whatever the program raises, or AssertionError, where the command is not one that it takes."""
    program, *rest = command.words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert all(word in targets for word in rest if "=" not in word), command
    elif program in {"bash", "sbatch"}:
        script = next(word for word in rest if not word.startswith("-"))
        assert (REPOSITORY / script).is_file(), command
        check_overrides(rest[rest.index(script) + 1 :])
    elif program in LAUNCHERS:
        check_overrides(rest[rest.index(LAUNCHERS[program]) + 2 :])
    elif rest[0] == "-m" and rest[1] in TAKES_OVERRIDES:
        check_overrides(rest[2:])
    else:
        check_parser(rest, monkeypatch)


def check_overrides(words: list[str]) -> None:
    """Compose and validate; of a sweep, the first job. Options of plan are looked at by its own tests."""
    sweep = bool({"-m", "--multirun"} & set(words))
    overrides, skip = [], False
    for word in words:
        if word == "...":  # stands for further overrides
            continue
        if skip or word == "-m" or OPTION.match(word):
            skip = not skip and bool(OPTION.match(word)) and "=" not in word and word not in WITHOUT_VALUE
            continue
        name, _, value = word.partition("=")
        overrides.append(f"{name}={value.split(',')[0]}" if sweep and value[:1] not in {"[", "'", '"'} else word)
    if set(words) & {"--help", "--cfg", "-h"}:
        return
    if not any(word.startswith(("trainer.max_", "experiment=")) for word in overrides):
        overrides.append("trainer.max_steps=100")
    compose_run(overrides, check_files=False)


def check_parser(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the module until its parser has taken the arguments."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(parser: argparse.ArgumentParser, *arguments: Any, original: Any = original, **options: Any) -> Any:
            original(parser, *arguments, **options)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    if words[0] == "-m":
        monkeypatch.setattr(sys, "argv", [words[1], *words[2:]])
        with pytest.raises(Parsed):
            runpy.run_module(words[1], run_name="__main__")
    else:
        assert (REPOSITORY / words[0]).is_file(), words


def test_the_pages_print_commands() -> None:
    assert len(COMMANDS) > 20
    assert {command.page for command in COMMANDS} >= {"README.md", "data.md", "distributed.md", "checkpoints.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_a_printed_command_is_taken(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "python -m ngpt.train optimizer.rnak=4",
        "python -m ngpt.checkpoint lsit RUN",
        "torchrun --standalone --nproc_per_node 2 -m ngpt.train experiment=no_such",
        "bash launch/no_such.sh",
        "make trian",
    ],
)
def test_a_wrong_command_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(Command("a page", text), monkeypatch)


SETTING = re.compile(rf"`((?:{'|'.join(sorted([*GROUPS, 'run']))})\.[a-z_]+)(?:=[^`]*)?`")


def named_settings(page: Path) -> set[str]:
    """Settings in backticks; on the pages for users of other programs, those in the column of this one."""
    text = page.read_text(encoding="utf-8")
    if page.name in OTHER_PROGRAMS:
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        text = "\n".join(row[1] for row in rows if len(row) > 1)
    return set(SETTING.findall(text))


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda page: page.name)
def test_a_setting_that_a_page_names_exists(page: Path) -> None:
    files = {name for name in named_settings(page) if name.endswith((".py", ".safetensors", ".model", ".json"))}
    others = {"optimizer.zero_grad", "optimizer.step", "trainer.max_stps"}  # methods; a slip, where pages show what it is answered
    assert named_settings(page) - set(settings()) - files - others == set()


def test_the_names_of_hugging_faces_trainer_are_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    rows = [line.split(" | ")[0] for line in (REPOSITORY / "docs" / "from_hf_trainer.md").read_text(encoding="utf-8").splitlines()]
    named = {name for row in rows if row.startswith("| `") for name in re.findall(r"`([a-z_0-9]+)", row)}
    assert len(named) > 20
    assert named - known - {"TrainingArguments"} == set()


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = set(re.findall(r"\]\(([a-z_]+\.md)\)", (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")))
    pages = {page.name for page in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert pages == listed


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
