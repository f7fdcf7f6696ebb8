"""Check token shards against their manifest: python -m data_prep.verify tokens"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np

from ngpt.data.documents import DataError
from ngpt.data.token_shards import Manifest, Shard, read_manifest, shard_problem

_READ_TOKENS = 2**22


def problems(folder: Path, manifest: Manifest) -> list[str]:
    """Everything that is wrong with a folder: sizes, checksums, ids outside the vocabulary, counts of documents."""
    return [problem for shard in manifest.shards for problem in _shard_problems(folder, manifest, shard)]


def _shard_problems(folder: Path, manifest: Manifest, shard: Shard) -> list[str]:
    problem = shard_problem(folder, manifest, shard)
    if problem:
        return [problem]
    path = folder / shard.file
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    digest, documents, largest, last = hashlib.sha256(), 0, -1, manifest.eos_id
    with open(path, "rb") as file:
        while data := file.read(_READ_TOKENS * dtype.itemsize):
            tokens = np.frombuffer(data, dtype)
            digest.update(data)
            documents += int(np.count_nonzero(tokens == manifest.eos_id))
            largest, last = max(largest, int(tokens.max())), int(tokens[-1])
    found = []
    if digest.hexdigest() != shard.sha256:
        found.append(f"{path}: the checksum is {digest.hexdigest()[:12]}..., the manifest says {shard.sha256[:12]}...")
    if largest >= manifest.vocab_size:
        found.append(f"{path}: token {largest} is outside the vocabulary of {manifest.vocab_size}")
    if documents != shard.documents:
        found.append(f"{path}: {documents} documents, the manifest says {shard.documents}")
    if last != manifest.eos_id:
        found.append(f"{path}: the last document is not closed by EOS ({manifest.eos_id})")
    return found


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 if every folder is sound."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Check token shards against their manifest.")
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
