"""docs/distributed.md lists what the code has: the names of DeepSpeed that it relies on, the settings of the engine, the launch scripts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from ngpt.config.schema import EngineConfig
from ngpt.engine.deepspeed_contract import BELOW, CONTRACT, OLDEST

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_every_name_of_deepspeed_is_listed() -> None:
    section = TEXT.split("## DeepSpeed")[1].split("\n## ")[0]
    missing = [f"{name.module}: {name.path}" for name in CONTRACT if f"`{name.path}`" not in section or f"`{name.module}`" not in section]
    assert not missing, "list them in docs/distributed.md"
    listed = {word.strip("`*,.:") for word in section.split() if word.startswith("`")}
    known = {name.path for name in CONTRACT} | {name.module for name in CONTRACT} | {"ngpt/engine/deepspeed_contract.py"}
    assert listed <= known, f"no longer relied on: {sorted(listed - known)}"


def test_the_versions_of_deepspeed_are_those_that_are_checked() -> None:
    oldest, below = (".".join(map(str, version)) for version in (OLDEST, BELOW))
    assert f"DeepSpeed {oldest} and later, below {below}." in TEXT


@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig) if field.name != "name"])
def test_every_setting_of_the_engine_is_explained(name: str) -> None:
    assert f"`engine.{name}" in TEXT


def test_every_launch_script_of_several_processes_is_named() -> None:
    scripts = {path.name for path in (REPOSITORY / "launch").iterdir() if path.is_file()} - {"one_gpu.sh", "docker.sh"}
    assert not [script for script in scripts if f"`launch/{script}`" not in TEXT]
