"""Random orders that are the same on every machine and with every version of NumPy and Python."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: object) -> int:
    """A 128-bit seed that depends on every part (and on nothing else); different parts give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:16], "little")


def permutation(count: int, seed: int) -> np.ndarray:
    """A seeded permutation of range(count), int64.

    Sorts raw 64-bit draws: NumPy keeps a bit generator's raw stream for ever, but not the methods of Generator (NEP 19).
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
