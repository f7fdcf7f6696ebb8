"""Counting the bytes of all tensors that are alive at one time, for the measurements of memory on the CPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, while they are alive; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._known.update(x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor))
        result = func(*args, **(kwargs or {}))
        for output in tree_iter(result):
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in self._known:
                self._add(output.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
