"""docs/faults.md and docs/reliability.md speak of the tests as they are."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("make_fault_table", REPOSITORY / "docs" / "make_fault_table.py")
table = importlib.util.module_from_spec(specification)
sys.modules["make_fault_table"] = table  # where dataclasses look for the module of theirs
specification.loader.exec_module(table)


def test_the_table_of_faults_has_a_row_for_every_test_that_carries_one() -> None:
    page, rows = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8"), table.rows_of()
    file, written = "", {}
    for line in page.splitlines():
        if line.startswith("## "):
            file = line.removeprefix("## ")
        elif found := re.fullmatch(r"\| (.*) \| .* \| `(test_\w+)` \|", line):
            written[file, found[2]] = line
    assert written.keys() == rows.keys(), "docs/faults.md is out of date: run `make faults`"
    stale = [
        row.test for key, row in rows.items() if not written[key].startswith(f"| {table.cell(row.tried)} | {table.cell(row.expected)} | ")
    ]
    assert stale == [], "what these tests say of themselves has changed: run `make faults`"


def test_the_table_of_faults_is_green() -> None:
    """What failed when the page was written stays on it, for everybody to see, until it is mended."""
    assert "all green" in (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    cases = [
        (
            "test_a[1]",
            '<properties><property name="seen" value="Error: /tmp/pytest-of-me/pytest-3/popen-gw1/test_a0/x | broken"/></properties>',
        ),
        ("test_a[2]", '<failure message="boom">trace</failure>'),
        ("test_b", '<skipped message="no such thing here"/>'),
        ("test_c", ""),
        ("test_no_row", ""),
    ]
    (tmp_path / "tests").mkdir()
    doc = '"""Module."""\n' + "".join(f'def test_{name}():\n    """try {name} | expect"""\n' for name in "abcd")
    (tmp_path / "tests/test_x.py").write_text(doc + "def test_no_row(): ...\n")
    found = "".join(f'<testcase classname="tests.test_x" name="{name}">{inner}</testcase>' for name, inner in cases)
    (tmp_path / "results.xml").write_text(f"<testsuites><testsuite>{found}</testsuite></testsuites>")
    return tmp_path


def test_green_is_what_all_tests_have_made_it(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "REPOSITORY", results)
    rows = table.rows_of(results)
    table.add_results(rows, results / "results.xml")
    assert [row.outcome for row in rows.values()] == ["failed", "skipped", "passed", "not run"]
    page = table.render(rows)
    assert "**4 faults, tried in 4 cases: 1 failed, 1 skipped, 1 passed, 1 not run**" in page
    assert "| try a | expect | **failed** (1 of 2 cases): Error: test_a0/x \\| broken; boom | `test_a` |" in page
    assert "| try b | expect | **skipped**: no such thing here | `test_b` |" in page
    for key in [key for key, row in rows.items() if row.outcome != "passed"]:
        del rows[key]
    assert "**1 faults, tried in 1 cases: all green**" in table.render(rows)


def test_every_test_that_the_page_of_promises_names_exists() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page)
    assert len(named) > 40
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (REPOSITORY / file).read_text(encoding="utf-8")]
    assert missing == []
