"""Settings of the whole test run: few threads per process, and slow tests after all others."""

import os

# Before torch is imported: small matrices gain nothing from threads, and several processes on few cores lose much by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests marked slow last, so that a mistake shows within seconds."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
