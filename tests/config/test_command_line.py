"""Options of commands: what a slip of the keyboard is answered with."""

from __future__ import annotations

import pytest

from ngpt.config import command_line


def a_parser() -> command_line.CommandParser:
    parser = command_line.parser("Do a thing.", "python -m thing A --keep 2\n\nexit codes: 0 done", prog="python -m thing")
    parser.add_argument("target")
    parser.add_argument("--keep", type=int, required=True)
    parser.add_argument("--max-tokens", "-t", type=int, default=0)
    parser.add_argument("--shift", type=float, default=0.0)
    parser.add_argument("--prompt", default="")
    parser.add_argument("rest", nargs="*")
    return parser


def parts() -> command_line.CommandParser:
    parser = command_line.parser("Do things.", "python -m things list", prog="python -m things")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("list")
    commands.add_parser("prune", epilog=parser.epilog).add_argument("--keep", required=True)
    return parser


def refusal(parser: command_line.CommandParser, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(" --help shows all options, with examples\n")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["a", "--kep", "2"], "--kep: no such option; did you mean --keep?"),
        (["a", "--kee=2"], "--kee: no such option; did you mean --keep?"),
        (["a", "--keep", "2", "--max_tokens=5"], "--max_tokens: no such option; did you mean --max-tokens?"),
        (["a", "--keep", "2", "--frobnicate"], "--frobnicate: no such option\n"),
        (["a", "--keep", "2", "-x"], "-x: no such option"),
    ],
)
def test_an_unknown_option_is_named_with_what_was_meant(arguments, meant, capsys):
    assert meant in refusal(a_parser(), arguments, capsys)


def test_all_unknown_options_are_named_at_once(capsys):
    message = refusal(a_parser(), ["a", "--kep", "2", "--max-token", "5"], capsys)
    assert "did you mean --keep?" in message
    assert "did you mean --max-tokens?" in message


def test_what_only_looks_like_an_option_is_taken_as_it_is():
    options = a_parser().parse_args(["--keep", "2", "--shift", "-1.5", "-t5", "--prompt", "- a text", "--", "a", "--not-mine"])
    assert (options.shift, options.max_tokens, options.prompt, options.rest) == (-1.5, 5, "- a text", ["--not-mine"])


def test_a_part_of_a_command_knows_its_options_and_the_command_its_parts(capsys):
    assert "--kep: no such option; did you mean --keep?" in refusal(parts(), ["prune", "--kep", "2"], capsys)
    assert "prun is not one of the choices; did you mean prune?" in refusal(parts(), ["prun", "--keep", "2"], capsys)
    assert "required: --keep" in refusal(parts(), ["prune"], capsys)
    assert parts().parse_args(["prune", "--keep", "2"]).keep == "2"


def test_a_choice_that_is_none_is_named_with_the_others(capsys):
    parser = a_parser()
    parser.add_argument("--dtype", choices=["fp32", "bf16"])
    assert "argument --dtype: fp3 is not one of the choices; did you mean fp32?" in refusal(
        parser, ["a", "--keep", "1", "--dtype", "fp3"], capsys
    )
    assert "zzz is not one of the choices; choose fp32 or bf16" in refusal(parser, ["a", "--keep", "1", "--dtype", "zzz"], capsys)


def test_no_secret_is_repeated_in_an_error(capsys):
    assert "hunter2hunter2" not in refusal(a_parser(), ["a", "--keep", "1", "--max-tokens", "token=hunter2hunter2"], capsys)


def test_help_ends_with_the_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        a_parser().parse_args(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith("examples:\n  python -m thing A --keep 2\n\n  exit codes: 0 done\n")
