"""Writes docs/map.md: every file of the project with the line in which it says what it is for. Run by `make map`."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("ngpt", "conf", "data_prep", "bench", "launch", "docs")
SUFFIXES = {".py", ".yaml", ".sh", ".sbatch"}
HEADER = """\
# Map

Every file, with the line in which it says of itself what it is for. `make map` writes this page; a test keeps it current.
"""


def purpose(path: Path) -> str:
    """The first line of a module's docstring, or of the comment on top of any other file; empty where there is none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
        return docstring.partition("\n")[0]
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and not line.startswith(("#!", "# @package")))
    return next(comments, "")


def described_files(folder: Path) -> list[Path]:
    """The files of one folder that belong on the map, in order; a package's `__init__.py` is described by the folder's own line."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.name != "__init__.py")


def section(folder: Path, root: Path) -> list[str]:
    """One folder: its heading, what its `__init__.py` says, and a line for each file; nothing for a folder without files."""
    files = described_files(folder)
    if not files:
        return []
    package = folder / "__init__.py"
    name = folder.relative_to(root).as_posix()
    lines = [f"\n## {name}/\n"] + ([f"{purpose(package)}\n"] if package.exists() and purpose(package) else [])
    for path in files:
        said = purpose(path)
        lines.append(f"- [{path.name}](../{name}/{path.name})" + (f": {said}" if said else ""))
    return lines


def render(root: Path = REPOSITORY) -> str:
    """The whole page for the repository at `root`."""
    folders = [folder for top in FOLDERS for folder in [root / top, *sorted((root / top).rglob("*"))] if folder.is_dir()]
    lines = [line for folder in folders if not folder.name.startswith((".", "__")) for line in section(folder, root)]
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (REPOSITORY / "docs" / "map.md").write_text(render(), encoding="utf-8")
