"""The endless iterator of training batches: a background thread prepares them, one small state resumes them."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ngpt.data.batch import Batch, make_batch
from ngpt.data.documents import JSON, DataError
from ngpt.data.layout import Layout
from ngpt.data.packing import RowSource

_STATE_VERSION = 1
_POLL_SECONDS = 0.1


@dataclass
class _Prepared:
    """What the background thread hands over: a batch with the state after it, at the end of a global batch, or its failure."""

    batch: Batch | None = None
    state: dict[str, JSON] | None = None
    failure: BaseException | None = None


class TrainLoader:
    """Endless micro-batches in order, prepared by a background thread.

    `state_dict` describes the batches handed out, whatever has been prepared beyond them. It is world-size independent once the
    parts of all ranks are merged (`merge_states`). Errors of the background thread (DataError and others) are raised by `next`.
    `on_start` is called before the first batch, and before the first one after `load_state_dict`.
    """

    def __init__(
        self,
        layout: Layout,
        rows: Mapping[int, RowSource],
        *,
        settings: Mapping[str, JSON],
        counters: Callable[[], Mapping[str, float]] = dict,
        on_start: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
        prefetch: int = 8,
        pin_memory: bool = False,
    ) -> None:
        self._layout = layout
        self._rows = rows
        self._settings = {"streams": layout.num_streams, "global_batch_size": layout.global_batch_size, **settings}
        self._counters = counters
        self._on_start = on_start
        self._on_close = on_close
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._batches_done = 0
        self._state = self._current_state(0)
        self._within_batch = False
        self._wait_seconds = 0.0
        self._prepared: queue.Queue[_Prepared] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._start()
        began = time.perf_counter()
        prepared = self._prepared.get()
        self._wait_seconds += time.perf_counter() - began
        if prepared.failure is not None:
            self._prepared.put(prepared)
            raise prepared.failure
        assert prepared.batch is not None
        self._within_batch = prepared.state is None
        self._state = prepared.state or self._state
        return prepared.batch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state of this rank after the last batch handed out, a few hundred bytes per stream.

        Raises RuntimeError in the middle of a global batch: an optimizer step ends at its end, and so does a checkpoint.
        """
        if self._within_batch:
            raise RuntimeError("the state of the data is defined at the end of a global batch, not in the middle of one")
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch of `state`. Raises DataError if it belongs to other data, or lacks a stream of this rank."""
        self._check(state)
        self._halt()
        for stream, rows in self._rows.items():
            rows.load_state(state["streams"][str(stream)])
        self._batches_done = state["global_batches"]
        self._within_batch = False
        self._state = state

    def stats(self) -> dict[str, float]:
        """Counters since the start of the process: bad and empty documents skipped, retries, seconds that `next` waited.

        What was read ahead is counted too.
        """
        return {**self._counters(), "wait_seconds": self._wait_seconds}

    def close(self) -> None:
        """Stop the background threads. The loader cannot be used afterwards."""
        self._stop.set()
        self._on_close()
        self._halt()

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise DataError(f"a data state of version {state.get('version')}, not {_STATE_VERSION}; it was saved by another release")
        saved = state["settings"]
        changed = [
            f"{name} was {saved.get(name)!r}, is {self._settings.get(name)!r}"
            for name in sorted({*saved, *self._settings})
            if saved.get(name) != self._settings.get(name)
        ]
        if changed:
            raise DataError(
                f"the saved position does not fit this data: {'; '.join(changed)}. Restore the data and its settings, or start a new run"
            )
        missing = [stream for stream in self._rows if str(stream) not in state["streams"]]
        if missing:
            raise DataError(f"the data state lacks streams {missing}: merge the states of all ranks that saved it (merge_states)")

    def _current_state(self, global_batches: int) -> dict[str, JSON]:
        return {
            "version": _STATE_VERSION,
            "settings": self._settings,
            "global_batches": global_batches,
            "streams": {str(stream): rows.state() for stream, rows in self._rows.items()},
        }

    def _start(self) -> None:
        """Prepare batches from the current position on: from the beginning, or from that of the state loaded last."""
        self._on_start()
        self._thread = threading.Thread(target=self._produce, name="ngpt-data", daemon=True)
        self._thread.start()

    def _halt(self) -> None:
        """Stop the background thread and forget what it has prepared."""
        if self._thread is not None:
            self._stop.set()
            with contextlib.suppress(queue.Empty):
                self._prepared.get_nowait()  # the thread may be waiting for room
            self._thread.join()
            self._thread = None
        self._stop = threading.Event()
        self._prepared = queue.Queue(maxsize=self._prefetch)

    def _produce(self) -> None:
        try:
            for prepared in self._prepare(self._batches_done):
                self._hand_over(prepared)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._hand_over(_Prepared(failure=error))

    def _hand_over(self, prepared: _Prepared) -> None:
        """Put it in the queue, unless the loader is halted while the queue is full."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._prepared.put(prepared, timeout=_POLL_SECONDS)
                return

    def _prepare(self, global_batches: int) -> Iterator[_Prepared]:
        layout = self._layout
        streams = layout.streams
        before, after = layout.foreign_rows()
        plan = list(layout.micro_batches())
        for number in itertools.count(global_batches):
            self._rows[streams[0]].skip(before)
            for first, parts in plan:
                rows = [self._rows[stream].take(count) for stream, count in parts]
                last = first == plan[-1][0]
                if last:
                    self._rows[streams[-1]].skip(after)
                batch = make_batch(rows, first_row=number * layout.global_batch_size + first, pin_memory=self._pin_memory)
                yield _Prepared(batch, self._current_state(number + 1) if last else None)


def position_of(state: dict[str, Any]) -> dict[str, JSON]:
    """What several ranks must agree on after the same global batch: the parts of a state that are not of one rank alone."""
    streams = {f"stream {stream}": rows for stream, rows in state["streams"].items()}  # which one rank has, or several where they are few
    return {"the number of batches taken": state["global_batches"], "the settings of the data": state["settings"], **streams}


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks after the same global batch as one, which any number of ranks can load."""
    first = states[0]
    for other in states[1:]:
        if any(other[key] != first[key] for key in ("version", "settings", "global_batches")):
            raise ValueError("data states of different runs or steps cannot be merged")
    return {**first, "streams": {stream: state for part in states for stream, state in part["streams"].items()}}
