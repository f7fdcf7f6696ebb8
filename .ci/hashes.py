"""The SHA-256 of every file that a pin may stand for: written from the registry's index, and compared with what pip is about to install.

    python .ci/hashes.py write           for every pin of constraints.txt: asks the registry that pip uses, writes .ci/hashes.txt
    python .ci/hashes.py check REPORT    of `pip install --dry-run --report`: prints requirements, each with the one hash it must have

pip's own --require-hashes takes no ranges, no checkout and no constraints with hashes, so the files that it has chosen are looked up here
and then installed by exactly these hashes (.ci/install.sh). A build with a local version (torch's CPU build, 2.13.0+cpu) comes from another
registry and is not in the list.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
HASHES = REPOSITORY / ".ci" / "hashes.txt"
HEADER = "# SHA-256 of the files of each pin, written by .ci/hashes.py: whichever Python and platform, pip's choice must be one of them.\n"
TOO_OLD_OR_NEW = re.compile(r"-(?:cp(?:2\d|3[0-9]|31[4-9])|pp\d+|cp\d+-cp3(?:[0-9]|1[4-9])t?)-(?!abi3)|\.(?:exe|egg|msi|rpm)$")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, set[str]]:
    """Versions of every package of constraints.txt; a version for each range of Pythons."""
    found: dict[str, set[str]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^;\s]+)", line):
            found.setdefault(normalized(match[1]), set()).add(match[2])
    return found


def write() -> None:
    """Ask the registry for the files of every pin. Raises SystemExit where a pin has none."""
    from pip._internal.models.index import PyPI

    index = os.environ.get("PIP_INDEX_URL", PyPI.simple_url).rstrip("/")
    lines = []
    for name, versions in sorted(pins().items()):
        request = urllib.request.Request(f"{index}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        with urllib.request.urlopen(request) as answer:
            files: list[dict[str, Any]] = json.load(answer)["files"]
        for version in sorted(versions):
            stem = re.compile(rf"(?i)^{'[-_.]+'.join(map(re.escape, name.split('-')))}-{re.escape(version)}(?:-|\.tar|\.zip)")
            fitting = {file["filename"]: file["hashes"]["sha256"] for file in files if stem.match(file["filename"])}
            kept = {file: digest for file, digest in fitting.items() if not TOO_OLD_OR_NEW.search(file)}
            if not kept:
                raise SystemExit(f"{name}=={version}: the registry has no file of it")
            lines.append(f"{name}=={version} {' '.join(sorted(set(kept.values())))}\n")
    HASHES.write_text(HEADER + "".join(lines), encoding="utf-8")


def known() -> dict[str, set[str]]:
    """The hashes of each `name==version`."""
    lines = [line.split() for line in HASHES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {words[0]: set(words[1:]) for words in lines}


def check(report: dict[str, Any]) -> list[str]:
    """A requirement with its hash for each file that pip has chosen; the checkout itself is left out.

    Raises:
        SystemExit: a file is not one of those that its pin stands for, or a package has no pin.
    """
    hashes, requirements, wrong = known(), [], []
    for item in report["install"]:
        download = item["download_info"]
        if "archive_info" not in download:  # the checkout
            continue
        name, version = normalized(item["metadata"]["name"]), item["metadata"]["version"]
        archive = download["archive_info"]
        digest = archive.get("hashes", {}).get("sha256") or archive["hash"].partition("=")[2]
        if "+" not in version and digest not in hashes.get(f"{name}=={version}", set()):
            wrong.append(
                f"{name}=={version}: {download['url'].rsplit('/', 1)[-1]} has SHA-256 {digest}, which .ci/hashes.txt does not have for it"
            )
        requirements.append(f"{name}=={version} --hash=sha256:{digest}")
    if wrong:
        remedy = "Nothing was installed. A package was changed, or a pin was: after a change of constraints.txt, python .ci/hashes.py write"
        raise SystemExit("\n".join([*wrong, remedy]))
    return requirements


def main(arguments: list[str]) -> None:
    if arguments == ["write"]:
        write()
    elif len(arguments) == 2 and arguments[0] == "check":
        print("\n".join(check(json.loads(Path(arguments[1]).read_text(encoding="utf-8")))))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
