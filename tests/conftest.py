"""Settings of the whole test run: few threads per process, and slow tests after all others, processes for tests of several ranks."""

from __future__ import annotations

import os

# Before torch is imported: small matrices gain nothing from threads, and several processes on few cores lose much by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")

import contextlib
import importlib.util
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

# The same examples every time, however slow the machine: a test that fails here fails everywhere.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests marked slow last, so that a mistake shows within seconds."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_itemcollected(item: pytest.Item) -> None:
    """A test whose docstring reads `what is tried | what is expected` is a row of docs/faults.md (docs/make_fault_table.py)."""
    if " | " in (getattr(getattr(item, "function", None), "__doc__", None) or ""):
        item.add_marker("fault")


class _FirstWarning(logging.Handler):
    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """`seen(what)`: what a fault has led to, for its row in docs/faults.md; without it, the first error that was caught, or warning."""
    return lambda what: request.node.user_properties.append(("seen", str(what)))


@pytest.fixture(autouse=True)
def _what_a_fault_led_to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take down what a test of a fault sees, if it does not say so itself."""
    if request.node.get_closest_marker("fault") is None:
        yield
        return
    caught: list[str] = []
    raises = pytest.raises

    @contextlib.contextmanager
    def watched(*arguments: Any, **keywords: Any) -> Iterator[pytest.ExceptionInfo[BaseException]]:
        with raises(*arguments, **keywords) as error:
            yield error
        caught.append(f"{error.type.__name__}: {error.value}")

    monkeypatch.setattr(pytest, "raises", watched)
    warning = _FirstWarning(logging.WARNING)
    logging.getLogger("ngpt").addHandler(warning)
    yield
    logging.getLogger("ngpt").removeHandler(warning)
    properties = request.node.user_properties
    what = caught[0] if caught else warning.text
    if what and "seen" not in dict(properties):
        properties.append(("seen", what))


def _load_rank_pool() -> ModuleType:
    """tests/rank_pool.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("rank_pool", Path(__file__).with_name("rank_pool.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["rank_pool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Any]:
    """The processes behind `on_ranks`, which start when the first test needs them."""
    pool = _load_rank_pool().RankPool()
    yield pool
    pool.close()


@pytest.fixture
def on_ranks(rank_pool: Any, tmp_path: Path) -> Callable[..., list[Any]]:
    """`on_ranks(world_size, function, *args, timeout=120)`: results, by rank, of a top-level function in a fresh gloo group.

    What a rank raises is raised in the test; a rank that dies or hangs is killed and named.
    """
    stores = itertools.count()

    def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        return rank_pool.run(world_size, function, *args, store=tmp_path / f"ranks-{next(stores)}", timeout=timeout)

    return run
