"""What every file of the repository keeps to: no machine's paths, no registry's host, nothing left to do, nothing large by accident."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LARGEST_FILE = 1_000_000  # bytes

# The brackets keep these patterns from finding themselves.
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.$}~-])/(?:[w]ork|[r]oot|[o]pt|[h]ome|[U]sers)/",
    "a package registry's host": r"py[p]i\.org|py[t]honhosted|n[p]mjs|deb\.[d]ebian|download\.[p]ytorch|anaconda\.[o]rg|[c]rates\.io",
    "something left to do": r"\b(?:T[O]DO|F[I]XME|X[X]X)\b",
}


def repository_files() -> list[Path]:
    """Files that git keeps or would keep; the whole list is empty outside a git checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [path for name in done.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    found = repository_files()
    if not found:
        pytest.skip("not a git checkout, so which files belong to the project is unknown")
    return found


def offences(text: str, pattern: str) -> list[str]:
    """`line number: line` for each line that the pattern is found in."""
    return [f"{number}: {line.strip()[:100]}" for number, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(files: list[Path], what: str) -> None:
    found = []
    for path in files:
        if path.suffix not in {".png", ".jpg", ".model", ".npz", ".gz"}:
            found += [f"{path.relative_to(REPOSITORY)}:{line}" for line in offences(path.read_text(encoding="utf-8"), FORBIDDEN[what])]
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of somebody's machine", "see /" + "home/ada/ngpt"),
        ("a path of somebody's machine", "path: '/" + "opt/data'"),
        ("a package registry's host", "pip install -i https://py" + "pi.org/simple"),
        ("something left to do", "# TO" + "DO: later"),
    ],
)
def test_an_offence_is_found(what: str, line: str) -> None:
    assert offences(line, FORBIDDEN[what])


def test_no_file_is_large(files: list[Path]) -> None:
    assert [path.name for path in files if path.stat().st_size > LARGEST_FILE] == []


def test_git_keeps_every_room(files: list[Path]) -> None:
    kept = set(files)
    lost = [path for path in (REPOSITORY / "ngpt").rglob("*.py") if path not in kept]
    assert lost == [], "an entry of .gitignore hides source files"


def test_no_command_is_installed() -> None:
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert "scripts]" not in settings, "the command `ngpt` belongs to somebody else's program"
