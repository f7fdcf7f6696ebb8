"""Check token shards against their manifest: python -m data_prep.verify tokens"""

from __future__ import annotations

import sys
from pathlib import Path

from ngpt.config import command_line
from ngpt.data.documents import DataError
from ngpt.data.token_shards import Manifest, content_problems, read_manifest

EXAMPLES = """
python -m data_prep.verify tokens
python -m data_prep.verify tokens/train tokens/val

exit codes: 0 all is as the manifest says, 1 something is not"""


def problems(folder: Path, manifest: Manifest) -> list[str]:
    """Everything that is wrong with a folder: sizes, checksums, ids outside the vocabulary, counts of documents."""
    return [problem for shard in manifest.shards for problem in content_problems(folder, manifest, shard)]


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 if every folder is sound."""
    parser = command_line.parser("Check token shards against their manifest.", EXAMPLES, prog="python -m data_prep.verify")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders written by data_prep.tokenize")
    failed = False
    for name in parser.parse_args(argv).folders:
        try:
            folder, manifest = read_manifest(name)
            found = problems(folder, manifest)
        except DataError as error:
            found = [str(error)]
        for problem in found:
            print(f"error: {problem}", file=sys.stderr)
        failed = failed or bool(found)
        if not found:
            print(f"{name}: {len(manifest.shards)} shards, {manifest.totals()['tokens']:,} tokens, all as the manifest says")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
