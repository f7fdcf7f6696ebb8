"""Resolves the dependencies of pyproject.toml anew on several Pythons and writes constraints.txt.

    python .ci/resolve_pins.py python3.10 python3.11 python3.12 python3.13

Nothing is installed but a scratch environment for each interpreter. Name an older torch with TORCH_VERSION=2.13.0. A package whose newest
release is not the same for all Pythons gets one line for each range of them. Then write the hashes of the files, python .ci/hashes.py
write, and run `make test` on each Python before committing the result.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HEADER = """\
# The versions that ngpt is tested with, for Python {oldest} to {newest}, written by .ci/resolve_pins.py. pyproject.toml has the ranges.
# Markers stand where the newest release no longer supports the oldest Python. The CUDA packages come with torch's standard build only.
"""


def minor(python: str) -> int:
    """`3.12` -> 12, by which Pythons are ordered."""
    return int(python.partition(".")[2])


def resolve(python: str, torch: str) -> tuple[str, dict[str, str]]:
    """One interpreter's version ("3.12") and the version of every package that an installation with all extras would have."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([python, "-m", "venv", scratch], check=True)
        report = Path(scratch, "report.json")
        flags = ["--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        pip = [f"{scratch}/bin/python", "-m", "pip", "install", *flags]
        subprocess.run([*pip, f"torch{torch}", "pip", "setuptools", f"{REPOSITORY}[dev,types,eval]"], check=True)
        resolved = json.loads(report.read_text(encoding="utf-8"))
    packages = [item["metadata"] for item in resolved["install"]]
    versions = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"].partition("+")[0] for package in packages}
    del versions["ngpt-pretrain"]
    return ".".join(resolved["environment"]["python_version"].split(".")[:2]), versions


def lines_for(name: str, version_by_python: dict[str, str]) -> list[str]:
    """The pins of one package: one line, or one for each range of Pythons (oldest first) that share a version."""
    pythons = sorted(version_by_python, key=minor)
    starts = [python for i, python in enumerate(pythons) if i == 0 or version_by_python[pythons[i - 1]] != version_by_python[python]]
    lines = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        bounds = [f'python_version >= "{start}"'] * (start != starts[0]) + [f'python_version < "{end}"'] * (end is not None)
        lines.append(f"{name}=={version_by_python[start]}" + ("; " + " and ".join(bounds) if bounds else ""))
    return lines


def main(pythons: list[str]) -> None:
    if not pythons:
        raise SystemExit("name the interpreters to resolve for: python .ci/resolve_pins.py python3.10 python3.13")
    torch = f"=={os.environ['TORCH_VERSION']}" if "TORCH_VERSION" in os.environ else ""
    resolved = dict(resolve(python, torch) for python in pythons)
    pins = []
    for name in sorted({name for versions in resolved.values() for name in versions}):
        pins += lines_for(name, {python: versions[name] for python, versions in resolved.items() if name in versions})
    header = HEADER.format(oldest=min(resolved, key=minor), newest=max(resolved, key=minor))
    (REPOSITORY / "constraints.txt").write_text(header + "\n".join(pins) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
