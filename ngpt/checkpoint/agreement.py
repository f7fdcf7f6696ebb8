"""What all ranks decide together about files: rank 0 looks and tells the others, and what fails on one rank fails on all."""

from __future__ import annotations

import json
from collections.abc import Callable
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
        """What `decide` returns on rank 0, JSON-able, on every rank; so that a slow network file system shows all ranks the same files."""
        answer, error = None, None
        try:
            answer = decide() if self.rank == 0 else None
        except Exception as caught:
            error = caught
        self.raise_together(error)
        return answer if self.size == 1 else json.loads(self.gather(json.dumps(answer).encode())[0])

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if there is an error on any.

        Raises:
            OSError: all errors are such.
            CheckpointError: they are this and OSErrors.
            RuntimeError: something else is among them.
            With a single rank, its own error.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        gathered = self.gather(json.dumps(_described(error)).encode())
        failures = [(rank, *json.loads(text)) for rank, text in enumerate(gathered) if text != b"null"]
        if failures:
            raise _combined(failures) from error


def _described(error: Exception | None) -> tuple[str, int | None, str] | None:
    if error is None:
        return None
    if isinstance(error, OSError):
        return "OSError", error.errno, str(error)
    if isinstance(error, CheckpointError):
        return "CheckpointError", None, str(error)
    return "RuntimeError", None, f"{type(error).__name__}: {error}"


def _combined(failures: list[tuple[int, str, int | None, str]]) -> Exception:
    """One error of all failures (rank, kind, errno, text)."""
    kinds = {kind for _, kind, _, _ in failures}
    text = "; ".join(f"rank {rank}: {text}" for rank, _, _, text in failures)
    if kinds == {"OSError"}:
        return OSError(failures[0][2], text) if failures[0][2] is not None else OSError(text)
    return RuntimeError(text) if "RuntimeError" in kinds else CheckpointError(text)
