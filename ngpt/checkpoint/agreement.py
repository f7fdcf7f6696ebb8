"""What all ranks decide together about files: rank 0 looks and tells the others, and what fails on one rank fails on all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.dist.collectives import Collectives


class Agreement:
    """Decisions of the ranks of `collectives`, whose messages travel as tensors on `device`. All calls are collective."""

    def __init__(self, collectives: Collectives, device: torch.device | str = "cpu") -> None:
        self.rank = collectives.rank
        self.size = collectives.size
        self._collectives = collectives
        self._device = device

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank has, by rank."""
        return self._collectives.gather_bytes(data, self._device)

    def from_main(self, decide: Callable[[], Any]) -> Any:
        """What `decide` returns on rank 0, JSON-able, on every rank; so that a slow network file system shows all ranks the same files.

        What `decide` raises is raised as by `together`.
        """
        answer = None
        with self.together():
            if self.rank == 0:
                answer = decide()
        return answer if self.size == 1 else json.loads(self.gather(json.dumps(answer).encode())[0])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A body that works on files: where it raises OSError or ValueError on some rank, every rank raises at its end.

        Other errors, such as those of collectives, leave at once. A single rank raises its own.

        Raises:
            OSError: naming the ranks whose files failed.
            CheckpointError: not all of the errors were of that kind.
        """
        error = None
        try:
            yield
        except (OSError, ValueError) as caught:
            error = caught
        if self.size == 1:
            if error is not None:
                raise error
            return
        gathered = self.gather(json.dumps(_described(error)).encode())
        failures = [(rank, *json.loads(text)) for rank, text in enumerate(gathered) if text != b"null"]
        if failures:
            raise _combined(failures) from error


def _described(error: OSError | ValueError | None) -> tuple[bool, int | None, str] | None:
    """Whether an error is one of the system, its number if it has one, and its text, without the number."""
    if isinstance(error, OSError) and error.strerror:
        return True, error.errno, f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return None if error is None else (isinstance(error, OSError), None, str(error))


def _combined(failures: list[tuple[int, bool, int | None, str]]) -> OSError | CheckpointError:
    """One error of all failures (rank, whether of the system, errno, text)."""
    text = "; ".join(f"rank {rank}: {text}" for rank, _, _, text in failures)
    if not all(of_system for _, of_system, _, _ in failures):
        return CheckpointError(text)
    return OSError(text) if failures[0][2] is None else OSError(failures[0][2], text)
