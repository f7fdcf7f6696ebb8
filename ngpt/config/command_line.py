"""The parser of every command that takes options: examples in its help, and an answer to slips of the keyboard."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ngpt.config.redaction import redact
from ngpt.config.suggest import nearest

_NEGATIVE_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")
_WRONG_CHOICE = re.compile(r"(?P<where>.*)invalid choice: '?(?P<word>[^']*?)'? \(choose from (?P<choices>.*)\)", re.DOTALL)


def parser(description: str, examples: str, *, prog: str) -> CommandParser:
    """A parser for the command `prog`, such as `python -m ngpt.generate`.

    Args:
        description: one or two sentences: what the command does.
        examples: lines a user can copy, and after an empty line whatever else the help should end with, such as exit codes.
    """
    lines = "\n".join(f"  {line}".rstrip() for line in examples.strip().splitlines())
    return CommandParser(
        prog=prog, description=description, epilog=f"examples:\n{lines}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


class CommandParser(argparse.ArgumentParser):
    """argparse, but an option must be written in full, and one error names every unknown option with what may have been meant.

    The parsers of `add_subparsers().add_parser(...)` are of this kind too; give them the same epilog. Errors exit with code 2.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | keywords)

    # The arguments that are left when a command has read its own options go through here, for the command and each of its parts.
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        arguments = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # else the part that is named there knows its options
            unknown = [argument for argument in _options(arguments) if not self._accepts(argument)]
            if unknown:  # argparse alone would first complain of what is missing, which may be what was misspelt
                self.error("\n".join(self._no_such_option(argument) for argument in unknown))
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, without a page of usage around it."""
        wrong = _WRONG_CHOICE.fullmatch(message)
        if wrong:
            choices = [choice.strip(" '") for choice in wrong["choices"].split(",")]
            meant = nearest(wrong["word"], choices)
            hint = f"did you mean {meant}?" if meant else f"choose {' or '.join(choices)}"
            message = f"{wrong['where']}{wrong['word']} is not one of the choices; {hint}"
        self.exit(2, f"{redact(message)}\n{self.prog} --help shows all options, with examples\n")

    def _accepts(self, argument: str) -> bool:
        known = self._option_string_actions
        return argument.partition("=")[0] in known or (not argument.startswith("--") and argument[:2] in known)

    def _no_such_option(self, argument: str) -> str:
        name = argument.partition("=")[0]
        meant = nearest(name, _long_first(self._option_string_actions))
        return f"{name}: no such option" + (f"; did you mean {meant}?" if meant else "")


def _options(arguments: Sequence[str]) -> list[str]:
    """What looks like an option, as argparse sees it: not after `--`, not a negative number, and not a text with blanks in it."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return [each for each in before if each.startswith("-") and len(each) > 1 and not _NEGATIVE_NUMBER.match(each) and " " not in each]


def _long_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=len, reverse=True)
