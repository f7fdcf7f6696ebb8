"""docs/troubleshooting.md quotes what the program says: every message is in the sources, those about settings are made to happen."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from ngpt.config.compose import check_arguments, compose_run
from ngpt.config.problems import ConfigError
from ngpt.config.validate import validate
from ngpt.dist import exit_codes

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^> (.+)$", PAGE, re.MULTILINE)
SETTINGS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", PAGE, re.MULTILINE)
BASE = ["data=synthetic", "trainer.max_steps=8", "trainer.global_batch_size=8", "trainer.micro_batch_size=4", "trainer.seq_len=32"]
HOLE = "\0"


@functools.cache
def texts() -> list[str]:
    """Every text in the sources, joined as Python joins them, with a hole for each value."""
    found = []
    for file in [*(REPOSITORY / "ngpt").rglob("*.py"), *(REPOSITORY / "data_prep").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\d]*[sdrfg]", HOLE, node.value))
    return [re.sub(r"\0+", HOLE, text) for text in found]


def is_said(quote: str) -> bool:
    """Whether some text of the sources has all words of the quote in their order."""
    words = r"[\s\S]*".join(re.escape(part) for part in quote.split("…"))
    return any(re.search(words, text) for text in texts())


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_one_of_ours(quote):
    assert is_said(quote)


def test_a_message_that_nobody_says_would_be_noticed():
    assert len(QUOTES) > 30
    assert is_said("resume = …: not a complete checkpoint")
    assert not is_said("resume = …: not a whole checkpoint")


def _check(arguments: list[str]) -> None:
    check_arguments(arguments)
    validate(compose_run(arguments), world_size=1)


@pytest.mark.parametrize(("given", "answer"), SETTINGS)
def test_a_mistake_in_settings_is_answered_as_the_page_says(given, answer):
    names = {argument.partition("=")[0] for argument in given.split()}
    arguments = [argument for argument in BASE if argument.partition("=")[0] not in names] + given.split()
    with pytest.raises(ConfigError) as error:
        _check(arguments)
    assert answer in str(error.value)


def test_the_exit_codes_are_those_of_the_program():
    rows = dict(re.findall(r"^\| (\d+) \| `(EXIT_\w+)` \|", PAGE, re.MULTILINE))
    assert {int(code): name for code, name in rows.items()} == {
        code: name for name, code in vars(exit_codes).items() if name.startswith("EXIT_")
    }


def test_every_page_that_is_named_exists():
    for page in re.findall(r"\]\((\w+\.md)", PAGE):
        assert (REPOSITORY / "docs" / page).exists(), page
