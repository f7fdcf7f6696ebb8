"""docs/map.md is current, and every module says in its first line what it is for."""

from __future__ import annotations

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
make_map = runpy.run_path(str(REPOSITORY / "docs" / "make_map.py"))


def test_the_map_shows_the_tree_as_it_is() -> None:
    written = (REPOSITORY / "docs" / "map.md").read_text(encoding="utf-8")
    assert written == make_map["render"](), "docs/map.md is out of date: run `make map`"


def test_every_module_says_what_it_is_for() -> None:
    modules = [path for top in ("ngpt", "data_prep", "bench", "docs") for path in (REPOSITORY / top).rglob("*.py")]
    silent = [path.relative_to(REPOSITORY).as_posix() for path in modules if len(make_map["purpose"](path)) < 20]
    assert silent == [], "these modules need a docstring whose first line says what they are for"


def test_the_map_describes_modules_settings_and_scripts(tmp_path: Path) -> None:
    for file, text in {
        "ngpt/__init__.py": '"""The package."""',
        "ngpt/data/__init__.py": '"""Text to batches."""',
        "ngpt/data/packing.py": '"""Token ids to rows.\n\nMore."""\n',
        "conf/model/small.yaml": "# @package _global_\n# A small model.\nsize: 1\n",
        "launch/one.sh": "#!/usr/bin/env bash\n# One process.\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    page = make_map["render"](tmp_path)
    assert "## ngpt/data/\n\nText to batches.\n\n- [packing.py](../ngpt/data/packing.py): Token ids to rows.\n" in page
    assert "- [small.yaml](../conf/model/small.yaml): A small model.\n" in page
    assert "- [one.sh](../launch/one.sh): One process.\n" in page
