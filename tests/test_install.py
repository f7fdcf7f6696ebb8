"""Installation says clearly what it lacks, and installs pinned versions that agree with the declared ranges."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SUPPORTED_PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]


def pins(python: str) -> dict[str, Requirement]:
    """The pinned packages that apply to one Python version, by normalised name."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    applicable: dict[str, Requirement] = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert requirement.name not in applicable, f"two pins of {requirement.name} apply to Python {python}"
            applicable[requirement.name] = requirement
    return applicable


@pytest.mark.parametrize("python", SUPPORTED_PYTHONS)
def test_every_dependency_is_pinned_within_its_range(python: str) -> None:
    applicable = pins(python)
    declared = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in (Requirement(line) for line in declared):
        (pin,) = applicable[re.sub(r"[-_.]+", "-", requirement.name).lower()].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not admit the pin {pin.version}"


def test_the_tests_run_on_the_pinned_versions_of_torch_and_the_data_packages() -> None:
    from importlib.metadata import version

    applicable = pins(f"{sys.version_info[0]}.{sys.version_info[1]}")
    for name in ("torch", "numpy", "sentencepiece", "datasets", "deepspeed"):
        assert applicable[name].specifier.contains(version(name)), f"{name} {version(name)} is installed, the pin is {applicable[name]}"


def install_with(python: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installer with another interpreter; it must give up before it makes anything."""
    settings = os.environ | {"PYTHON": python} | environment
    command = ["bash", str(REPOSITORY / ".ci/install.sh"), str(folder / "venv")]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 1
    assert not (folder / "venv").exists()
    return done


def python_that_fails_on(pattern: str, folder: Path) -> str:
    """An interpreter that answers --version and fails where the code it is to run matches `pattern`."""
    path = folder / "python"
    path.write_text(f'#!/usr/bin/env bash\ncase "$*" in --version) echo Python 3.9.1;; *{pattern}*) exit 1;; *) exit 0;; esac\n')
    path.chmod(0o755)
    return str(path)


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    assert "no 'python-of-nobody' on this machine" in install_with("python-of-nobody", tmp_path).stderr


def test_a_python_that_is_too_old_is_refused_with_the_remedy(tmp_path: Path) -> None:
    said = install_with(python_that_fails_on("version_info", tmp_path), tmp_path).stderr
    assert "Python 3.9.1 is too old: ngpt needs Python 3.10 or newer." in said
    assert "PYTHON=python3.12 make" in said


def test_a_python_without_venv_is_refused_with_the_remedy(tmp_path: Path) -> None:
    assert "apt-get install python3-venv" in install_with(python_that_fails_on("ensurepip", tmp_path), tmp_path).stderr


def test_an_unknown_build_of_torch_is_refused(tmp_path: Path) -> None:
    assert "TORCH=gpu is none of auto, cpu, cuda." in install_with(sys.executable, tmp_path, TORCH="gpu").stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "--no-print-directory", "help"], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    assert done.stderr == "", "make itself has something to complain of"
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == set(targets.group(1).split())


@pytest.fixture(scope="module")
def hashes() -> dict[str, set[str]]:
    lines = (REPOSITORY / ".ci" / "hashes.txt").read_text(encoding="utf-8").splitlines()
    return {words[0]: set(words[1:]) for words in map(str.split, lines) if words[0] != "#"}


def checked(report: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / ".ci" / "hashes.py"), "check", str(report)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def report_of(path: Path, name: str, version: str, digest: str) -> Path:
    """What pip says of one file that it would install, beside the checkout."""
    file = {"url": f"https://registry/{name}-{version}.whl", "archive_info": {"hashes": {"sha256": digest}}}
    checkout = {
        "download_info": {"url": "file:///here", "dir_info": {"editable": True}},
        "metadata": {"name": "ngpt-pretrain", "version": "0"},
    }
    path.write_text(json.dumps({"install": [checkout, {"download_info": file, "metadata": {"name": name, "version": version}}]}))
    return path


def test_every_pin_has_the_hashes_of_its_files(hashes: dict[str, set[str]]) -> None:
    pinned = {str(requirement).partition(";")[0].strip() for python in SUPPORTED_PYTHONS for requirement in pins(python).values()}
    assert pinned == set(hashes)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digests in hashes.values() for digest in digests)


def test_a_file_on_record_is_installed_by_its_hash(tmp_path: Path, hashes: dict[str, set[str]]) -> None:
    digest = min(hashes["safetensors==0.8.0"])
    done = checked(report_of(tmp_path / "report.json", "safetensors", "0.8.0", digest))
    assert (done.returncode, done.stdout) == (0, f"safetensors==0.8.0 --hash=sha256:{digest}\n")


def test_a_file_that_is_not_on_record_is_refused_by_name(tmp_path: Path) -> None:
    """a package whose file was changed on the registry | nothing is installed, the file is named"""
    done = checked(report_of(tmp_path / "report.json", "safetensors", "0.8.0", "0" * 64))
    assert done.returncode == 1
    assert "safetensors==0.8.0: safetensors-0.8.0.whl has SHA-256 000" in done.stderr
    assert "Nothing was installed" in done.stderr


def test_the_hash_of_another_package_is_no_pass(tmp_path: Path, hashes: dict[str, set[str]]) -> None:
    assert checked(report_of(tmp_path / "report.json", "safetensors", "0.8.0", min(hashes["six==1.17.0"]))).returncode == 1


def test_only_a_build_of_another_registry_is_exempt(tmp_path: Path) -> None:
    assert checked(report_of(tmp_path / "report.json", "torch", "2.13.0+cpu", "0" * 64)).returncode == 0
    assert checked(report_of(tmp_path / "report.json", "torch", "2.13.0", "0" * 64)).returncode == 1
