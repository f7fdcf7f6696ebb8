"""Counting the bytes that a rank sends in collectives, whoever starts them: our engine, DeepSpeed, or torch itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ngpt.dist.collectives import Collectives


class WireBytes(TorchDispatchMode):
    """Adds up, by kind of collective, what this rank sends; as `ngpt.dist.collectives` counts it, by the ring algorithms.

    All collectives of torch.distributed end in operators of the namespace c10d, which the dispatcher shows; so nothing has to be
    wrapped, and what is compared is counted alike. Every process group is taken to hold all of `ranks`.
    """

    def __init__(self, ranks: Collectives) -> None:
        super().__init__()
        self._rank, self._size = ranks.rank, ranks.size
        self.sent: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return self.sent.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        match name:
            case "allreduce_" | "allreduce_coalesced_":
                self._add("all-reduce", 2 * _bytes(args[0]))
            case "broadcast_":
                self._add("broadcast", _bytes(args[0]))
            case "reduce_":
                self._add("reduce", _bytes(args[0]))
            case "_allgather_base_" | "allgather_into_tensor_coalesced_" | "allgather_":
                self._add("all-gather", _bytes(args[0]))
            case "_reduce_scatter_base_" | "reduce_scatter_tensor_coalesced_" | "reduce_scatter_":
                self._add("reduce-scatter", _bytes(args[1]))
            case "alltoall_base_":
                self._add_exchange(args[1], args[4])
            case "send":
                self.sent["send"] += _bytes(args[0])
            case "recv_" | "barrier" | "monitored_barrier_":
                pass
            case _:
                raise NotImplementedError(f"no count for c10d.{name}")

    def _add(self, kind: str, whole: int) -> None:
        self.sent[kind] += whole * (self._size - 1) // self._size

    def _add_exchange(self, source: Tensor, sizes: list[int]) -> None:
        """Exactly what is for others."""
        lines = sizes or [len(source) // self._size] * self._size
        others = sum(lines) - lines[self._rank]
        self.sent["all-to-all"] += others * source[:1].numel() * source.element_size()


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors))
