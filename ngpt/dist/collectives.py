"""Collectives of one group of ranks over torch.distributed, with a count of the bytes that this rank sends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Since torch 2.13 they go by new names, and the old ones warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Collectives:
    """The ranks that share a model; with a single process every call answers with what it was given.

    All ranks make the same calls in the same order, with tensors of the same shapes. `bytes_sent` adds up what this rank sends as the
    ring algorithms do it: (N - 1)/N of the whole for a reduce-scatter, an all-gather and a broadcast, twice that for an all-reduce, and
    exactly what is for others in an exchange.

    Args:
        group: ranks of a process group (None: the default one, or a single process where none was started).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        started = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if started else 1
        self.rank = dist.get_rank(group) if started else 0
        self.bytes_sent = 0

    @classmethod
    def single(cls) -> Collectives:
        """A group of this process alone, whatever others there are."""
        one = cls.__new__(cls)
        one._group, one.size, one.rank, one.bytes_sent = None, 1, 0, 0
        return one

    # ---------------------------------------------------------------------------------------------------------- tensors
    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest over ranks, element by element, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """What `source` has, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group_src=source, group=self._group)
            self._count(tensor.nbytes)
        return tensor

    def reduce_(self, tensor: Tensor, target: int) -> Tensor:
        """The sum over ranks, in place on `target`; what others have afterwards is undefined."""
        if self.size > 1:
            dist.reduce(tensor, group_dst=target, group=self._group)
            self._count(tensor.nbytes)
        return tensor

    def reduce_scatter(self, parts: Tensor) -> Reduction:
        """Start to sum parts (N, length) over ranks, of which rank k gets the k-th. `parts` is free after `wait`."""
        if self.size == 1:
            return Reduction(parts[0], None, parts)
        self._count(parts.nbytes)
        if self._is_gloo:  # whose reduce-scatter is an all-reduce of a copy
            received = torch.empty_like(parts)
            work = dist.all_to_all_single(received.view(-1), parts.view(-1), group=self._group, async_op=True)
            return Reduction(received, work, parts, of_rows=True)
        own = torch.empty_like(parts[0])
        return Reduction(own, _reduce_scatter(own, parts.view(-1), group=self._group, async_op=True), parts)

    def start_sum(self, tensor: Tensor) -> Reduction:
        """Start to sum a tensor over ranks, in place."""
        if self.size == 1:
            return Reduction(tensor, None, tensor)
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        self._count(2 * tensor.nbytes)
        return Reduction(tensor, work, tensor)

    def all_gather(self, part: Tensor) -> Tensor:
        """The parts (length,) of all ranks, as (N, length)."""
        if self.size == 1:
            return part[None]
        whole = part.new_empty(self.size, *part.shape)
        whole[self.rank] = part
        return self.spread_(whole)

    def spread_(self, parts: Tensor) -> Tensor:
        """Give all ranks all of (N, ...), contiguous, of which row k is right on rank k, in place."""
        if self.size == 1:
            return parts
        self._count(parts.nbytes)
        if self._is_gloo:  # whose all-gather is slower than a broadcast of every row
            works = [dist.broadcast(row, group_src=rank, group=self._group, async_op=True) for rank, row in enumerate(parts)]
            for work in works:
                assert work is not None
                work.wait()
        else:
            _all_gather(parts.view(-1), parts[self.rank].reshape(-1), group=self._group)
        return parts

    def exchange(self, to_send: Sequence[Tensor], to_receive: Sequence[int]) -> list[Tensor]:
        """Send flat tensor k to rank k, and get a flat tensor of `to_receive[k]` elements from rank k, all of one dtype."""
        if self.size == 1:
            return list(to_send)
        sent = torch.cat([part.reshape(-1) for part in to_send])
        received = sent.new_empty(sum(to_receive))
        sizes = [part.numel() for part in to_send]
        dist.all_to_all_single(received, sent, list(to_receive), sizes, group=self._group)
        self.bytes_sent += (sent.numel() - sizes[self.rank]) * sent.element_size()
        return list(received.split(list(to_receive)))

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, operation, group=self._group)
            self._count(2 * tensor.nbytes)
        return tensor

    @property
    def _is_gloo(self) -> bool:
        return dist.get_backend(self._group) == "gloo"

    def _count(self, size: int) -> None:
        self.bytes_sent += size * (self.size - 1) // self.size

    # ------------------------------------------------------------------------------------------------------ small things
    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.size == 1 else bool(self.max_(torch.tensor(int(flag), device=device)))

    def gather_bytes(self, data: bytes, device: torch.device | str = "cpu") -> list[bytes]:
        """What each rank has, by rank: bytes as they are, nothing is unpickled."""
        if self.size == 1:
            return [data]
        sizes = self.all_gather(torch.tensor([len(data)], device=device)).flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
        return [bytes(row[:size].tolist()) for row, size in zip(self.all_gather(padded).cpu(), sizes, strict=True)]

    def barrier(self, device: torch.device | str = "cpu") -> None:
        """Wait for all ranks."""
        self.any(False, device)


class Reduction:
    """A sum over ranks on its way."""

    def __init__(self, result: Tensor, work: dist.Work | None, source: Tensor, *, of_rows: bool = False) -> None:
        self._result, self._work, self._source, self._of_rows = result, work, source, of_rows

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for it."""
        return self._source.nbytes + (0 if self._result.data_ptr() == self._source.data_ptr() else self._result.nbytes)

    def wait(self) -> Tensor:
        """The sum."""
        if self._work is not None:
            self._work.wait()
        return self._result.sum(0) if self._of_rows else self._result
