"""The command that looks after checkpoints: `python -m ngpt.checkpoint verify|list|prune RUN`."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ngpt.checkpoint import retention
from ngpt.checkpoint.integrity import is_complete, problems, read_manifest, step_folders, step_of
from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.config import command_line
from ngpt.dist.exit_codes import EXIT_USER_ERROR

EXIT_BAD = 1  # some checkpoint is not what was saved
EXAMPLES = """
python -m ngpt.checkpoint list runs/c4_60m                  what there is; contents are not read
python -m ngpt.checkpoint verify runs/c4_60m                read all files and compare them with what was saved
python -m ngpt.checkpoint verify runs/c4_60m/checkpoints/step-0001000
python -m ngpt.checkpoint prune runs/c4_60m --keep 2 --dry-run
python -m ngpt.checkpoint prune runs/c4_60m --keep 2 --keep-every 10000

exit codes: 0 all is well, 1 a checkpoint is broken or unfinished (verify, list) or none is good (prune), 2 there are none"""
UNKNOWN = "no manifest"
Row = tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (CheckpointError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("Look after the checkpoints of a run.", EXAMPLES, prog="python -m ngpt.checkpoint")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, target: str = "run folder") -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text, epilog=parser.epilog, formatter_class=parser.formatter_class)
        own.add_argument("run", type=Path, metavar="RUN", help=target)
        own.set_defaults(command=command)
        return own

    add("verify", verify, "Read every file and compare its size and SHA-256 with what was saved.", "run folder, or one step folder")
    add("list", list_all, "List all checkpoints; sizes are compared, contents are not read.")
    prune_parser = add("prune", prune, "Remove what is older than the newest good checkpoints; those that stay are verified first.")
    prune_parser.add_argument("--keep", type=_positive, required=True, metavar="N", help="good checkpoints that stay")
    prune_parser.add_argument("--keep-every", type=_positive, default=0, metavar="STEPS", help="steps that are a multiple of this stay too")
    prune_parser.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    return parser


# ------------------------------------------------------------------------------------------------------------------- commands
def verify(options: argparse.Namespace) -> int:
    """Verify all checkpoints of a run, or one."""
    return _report(_chosen(options.run), contents=True)


def list_all(options: argparse.Namespace) -> int:
    """List all checkpoints of a run, and what has been set aside."""
    folder = _checkpoints_of(options.run)
    code = _report(step_folders(folder), contents=False)
    for aside in retention.passed_over(folder):
        _say(f"{aside.name} was passed over by a resume; prune removes it when it is old")
    return code


def prune(options: argparse.Namespace) -> int:
    """Remove old checkpoints, or say which would go."""
    folder = _checkpoints_of(options.run)
    good: list[Path] = []

    def is_good(checkpoint: Path) -> bool:
        found = problems(checkpoint)
        if found:
            _say(f"{checkpoint.name} does not count: {found[0]}")
        else:
            good.append(checkpoint)
        return not found

    old = retention.to_remove(folder, keep=options.keep, keep_every=options.keep_every, is_good=is_good)
    for checkpoint in old:
        _say(f"{'would remove' if options.dry_run else 'removing'} {checkpoint} ({_gigabytes(_size(checkpoint))} GB)")
        if not options.dry_run:
            retention.remove(checkpoint)
    if not old:
        _say(f"nothing to remove: {len(good)} good of {len(step_folders(folder))} checkpoints, {options.keep} to keep")
    return 0 if good else EXIT_BAD


# --------------------------------------------------------------------------------------------------------------------- tables
def _report(checkpoints: list[Path], *, contents: bool) -> int:
    """A table of checkpoints and below it what is wrong with them."""
    rows: list[Row] = [("step", "saved", "ranks", "files", "GB", "state")]
    broken: list[str] = []
    started = time.perf_counter()
    for checkpoint in checkpoints:
        found = problems(checkpoint, contents=contents)
        broken += found
        rows.append(_row(checkpoint, found, good="verified" if contents else "complete"))
    _say(table(rows))
    for problem in broken:
        _say(f"! {problem}")
    if contents:
        total = sum(map(_size, checkpoints))
        _say(f"{len(checkpoints)} checkpoints, {_gigabytes(total)} GB read in {time.perf_counter() - started:.1f} s")
    return EXIT_BAD if broken else 0


def _row(checkpoint: Path, found: list[str], *, good: str) -> Row:
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError:
        manifest = None
    state = ("BROKEN" if is_complete(checkpoint) else "UNFINISHED") if found else good if manifest else UNKNOWN
    saved = datetime.datetime.fromtimestamp(checkpoint.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
    counts = (str(manifest.ranks), str(len(manifest.files))) if manifest else ("?", "?")
    return (str(step_of(checkpoint)), saved, *counts, _gigabytes(_size(checkpoint)), state)


def table(rows: Sequence[Row]) -> str:
    """Lines of aligned columns, the last one to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows)


def _chosen(path: Path) -> list[Path]:
    if path.name.startswith("step-") and path.is_dir():
        return [path]
    return step_folders(_checkpoints_of(path))


def _checkpoints_of(run: Path) -> Path:
    """The folder of the checkpoints of a run, which may be given itself. Raises CheckpointError where there are none."""
    for folder in (run / "checkpoints", run):
        if step_folders(folder):
            return folder
    raise CheckpointError(f"{run}: there are no checkpoints; give a run folder such as runs/NAME")


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
