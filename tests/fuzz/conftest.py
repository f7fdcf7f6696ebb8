"""What the fuzzing tests share: how hard to try, damage of every kind, and a process with little memory.

NGPT_FUZZ=20 python -m pytest tests/fuzz      tries twenty times as many inputs
"""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FACTOR = int(os.environ.get("NGPT_FUZZ", "1"))


@pytest.fixture(scope="session")
def damaged() -> Callable[..., Iterator[bytes]]:
    """`damaged(data, count)`: seeded variants of `data`, cut, flipped, overwritten, doubled, or with something put in."""

    def vary(data: bytes, count: int, *, seed: int = 0) -> Iterator[bytes]:
        generator = random.Random(seed)
        for _ in range(count * FACTOR):
            result = bytearray(data)
            for _ in range(generator.choice((1, 1, 1, 2, 5))):
                first = generator.randrange(len(result) + 1)
                last = min(len(result), first + generator.choice((1, 1, 4, 100)))
                kind = generator.randrange(5)
                if kind == 0:
                    del result[first:]
                elif kind == 1 and first < len(result):
                    result[first] ^= 1 << generator.randrange(8)
                elif kind == 2:
                    result[first:last] = generator.randbytes(last - first)
                elif kind == 3:
                    result[first:first] = result[first:last]
                else:
                    result[first:first] = generator.choice((b"\0", b"\n", b"\xff", b"-", b"9" * 30, b'"', b"{", b"[" * 2000))
            yield bytes(result)

    return vary


@pytest.fixture(scope="session")
def memory_of() -> Callable[[str, Path], int]:
    """`memory_of(code, path)`: MiB that a new process needed at most to run `code` with sys.argv[1] = path; 1 GiB is all that it gets."""

    # Not ru_maxrss, which a process inherits from the one that starts it.
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's own memory is read from /proc")

    def run(code: str, path: Path) -> int:
        done = subprocess.run(
            [sys.executable, "-c", code + "\nprint(open('/proc/self/status').read())\n", str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)),
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
        assert peak is not None
        return int(peak[1]) // 2**10

    return run
