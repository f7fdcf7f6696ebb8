"""What an update under ZeRO costs one rank, from shapes and settings alone: bytes that it sends, by what they are for, and memory.

Arithmetic without tensors, for models and numbers of ranks of any size. Bytes are those of `Collectives.bytes_sent` (ring algorithms),
to the byte: what each parameter asks of the other ranks in each round of its update is listed here, and requests of a layer that share a
collective are added up as `lock_step` joins them.

Letters: a short side, b long side, r rank, w = r + OVERSAMPLING, s history, N ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from ngpt.optim.hyper_parameters import complete_parts
from ngpt.optim.projection import OVERSAMPLING
from ngpt.optim.sharding import Columns, Flat, Largest, OfFirst, Publish, Request, Sum
from ngpt.optim.state_cost import DEFAULTS, STORED_MOMENTS, expected_state_bytes

PURPOSES = ("gradients", "directions", "weights", "exchange", "sums", "refresh")
Shape = Sequence[int]
Layers = Sequence[Sequence[tuple[Shape, Mapping[str, Any]]]]  # shape and settings of each parameter, by layers that share collectives


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Args:
        stage: of ZeRO, 0 to 3.
        ranks: how many processes.
        dtype: of the weights.
        rank: the process that is asked about: the first has no part that is shorter than those of others.
        wire: dtype of gradients and directions between ranks (None: that of the weights).
        micro_batches: of an update.
        immediate: layers are updated inside backward.
        iterations: of the randomized range finder, one to three, as the gradient asks for.
    """

    stage: int
    ranks: int
    dtype: torch.dtype = torch.bfloat16
    rank: int = 0
    wire: torch.dtype | None = None
    micro_batches: int = 1
    immediate: bool = False
    iterations: int = 1

    @property
    def parts(self) -> int:
        """Into how many parts state is divided."""
        return 1 if self.stage == 0 else self.ranks

    @property
    def on_wire(self) -> torch.dtype:
        return self.wire or self.dtype

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def reductions(self) -> int:
        """How often a gradient is summed in an update."""
        return self.micro_batches if self.stage >= 2 else 1

    def share(self, length: int) -> int:
        """Elements of an equal part of an axis, padding included."""
        return -(-length // self.parts)

    def own(self, length: int, rank: int | None = None) -> int:
        """Elements of an axis that this rank (or another) has."""
        start, stop = self._span(length, self.rank if rank is None else rank)
        return stop - start

    def _span(self, length: int, rank: int) -> tuple[int, int]:
        rank, share = (0 if self.parts == 1 else rank), self.share(length)
        return min(rank * share, length), min((rank + 1) * share, length)


class _Message(NamedTuple):
    """A request of one update: elements that are summed, or broadcast, or of one rank's padded part, or sent in an exchange."""

    kind: type[Request]
    purpose: str
    numel: int
    dtype: torch.dtype


# ------------------------------------------------------------------------------------------------------------------ settings
def _completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    with_defaults = {**DEFAULTS, "subspace": "svd", "update_proj_gap": 200, **settings}
    return complete_parts(with_defaults, {}, "settings") if "rank" in settings else with_defaults


def _rank_of(shape: Shape, settings: Mapping[str, Any]) -> int:
    return min(shape) if settings["rank"] == "full" else settings["rank"]


def _width(shape: Shape, settings: Mapping[str, Any]) -> int:
    """Columns of the projected gradient."""
    return _rank_of(shape, settings) if settings["proj_type"] == "full" else max(shape)


def keeps_full_gradient(settings: Mapping[str, Any]) -> bool:
    """Whether an update with these settings needs the full gradient, as `LowRankAdamW.keeps_full_gradient` says."""
    if "rank" not in settings:
        return True
    done = _completed(settings)
    return done["rank"] == "full" or done["fisher"] == "diagonal" or done["complement"] != "none"


def part_on_wire(shape: Shape, settings: Mapping[str, Any], setup: Setup) -> int:
    """Elements of a rank's padded part of the gradient that is summed."""
    if "rank" not in settings:
        return setup.share(prod(shape))
    done = _completed(settings)
    if keeps_full_gradient(settings):
        return min(shape) * setup.share(max(shape))
    return _rank_of(shape, done) * setup.share(_width(shape, done))


# --------------------------------------------------------------------------------------------------- what an update asks for
def _search(shape: Shape, settings: Mapping[str, Any], setup: Setup, *, columns: bool) -> Iterator[_Message]:
    """A search for new bases in a term of the gradient, or in `columns` of it (`LowRankAdamW._find_bases`)."""
    (short, long), rank, wide = sorted(shape), settings["rank"], setup.arithmetic
    thin = settings["subspace"] != "svd" and settings["min_rank"] is None
    if thin:
        yield _Message(Largest, "refresh", 1, wide)
    elif columns:
        summed_wide = setup.reductions > 1
        dtype = torch.promote_types(setup.on_wire, torch.float32) if summed_wide else setup.on_wire
        yield _Message(Columns, "refresh", short * setup.share(long), dtype)
    else:
        yield _Message(Sum, "refresh", short * long, wide)
    for rows, others in ((short, long), (long, short))[: 2 if settings["proj_type"] == "full" else 1]:
        if thin and settings["subspace"] == "randomized":
            width = min(rank + OVERSAMPLING, rows)
            for _ in range(setup.iterations):
                yield _Message(Sum, "refresh", width * width, torch.float64) if columns else _Message(Sum, "refresh", others * width, wide)
                yield _Message(Sum, "refresh", rows * width, wide)
                yield _Message(OfFirst, "refresh", 1, torch.int32)
        elif thin:
            yield _Message(Sum, "refresh", rank if columns else rank * others, wide)
        yield _Message(OfFirst, "refresh", rows * rank, wide)


def _rotation(shape: Shape, settings: Mapping[str, Any], setup: Setup) -> Iterator[_Message]:
    """What the state asks for when it follows a new basis (`LowRankAdamW._rotate`)."""
    rank, wide, two_sided = _rank_of(shape, settings), setup.arithmetic, settings["proj_type"] == "full"
    share = setup.share(_width(shape, settings))
    if two_sided:
        yield _Message(Columns, "refresh", rank * share, wide)
        if settings["moments"] != "momentum":
            yield _Message(Columns, "refresh", share if settings["moments"] == "adafactor" else rank * share, wide)
    if settings["history"]:
        for _ in range(settings["history"] if two_sided else 0):
            yield _Message(Columns, "refresh", rank * share, setup.dtype)
        yield _Message(Sum, "refresh", settings["history"] ** 2, torch.float64)


def _state_sums(shape: Shape, settings: Mapping[str, Any], setup: Setup) -> Iterator[_Message]:
    """Sums over columns that an update of the state needs (`LowRankAdamW._change`)."""
    rank, wide = _rank_of(shape, settings), setup.arithmetic
    if settings["history"]:
        yield _Message(Sum, "sums", settings["history"], torch.float64)
    elif settings["fisher"] == "factored":
        yield _Message(Sum, "sums", rank * (rank + 1) // 2, wide)
    if settings["moments"] == "adafactor":
        yield _Message(Sum, "sums", rank, wide)
    if settings["min_rank"] is not None:
        yield _Message(Sum, "sums", 1, torch.float64)
    if settings["fisher"] == "diagonal":
        yield _Message(Sum, "sums", min(shape), wide)
        yield _Message(Sum, "sums", 1, torch.float64)
    elif settings["complement"] == "fira":
        yield _Message(Sum, "sums", 1, wide)


def _update(shape: Shape, settings: Mapping[str, Any], setup: Setup, *, refresh: bool, rotates: bool) -> Iterator[_Message]:
    """The coroutine `AdamW.update` or `LowRankAdamW.update` of one parameter, round by round."""
    is_split = setup.parts > 1 or setup.stage == 3
    publish = _Message(Publish, "weights", setup.share(prod(shape)), setup.dtype)
    if setup.immediate:
        yield _Message(Sum, "sums", 1, setup.arithmetic)
    if "rank" not in settings:
        yield from [publish] if is_split else []
        return
    whole = keeps_full_gradient(settings)
    if refresh and settings["rank"] != "full":
        if whole:
            yield from _search(shape, settings, setup, columns=True)
        if rotates and settings["on_refresh"] == "rotate":
            yield from _rotation(shape, settings, setup)
    yield from _state_sums(shape, settings, setup)
    if not is_split:
        return
    if whole or lifts_columns(shape, settings, setup):
        yield _Message(Flat, "exchange", _sent_in_exchange(shape, setup), setup.on_wire)
        yield publish
        return
    low = _rank_of(shape, settings) * setup.share(_width(shape, settings))
    yield _Message(Columns, "directions", low, setup.on_wire)
    if setup.stage == 3 or (settings["rounding"] == "master" and setup.dtype != setup.arithmetic):
        yield publish


def lifts_columns(shape: Shape, settings: Mapping[str, Any], setup: Setup) -> bool:
    """As `LowRankAdamW._lifts_columns`."""
    keeps_master = settings["rounding"] == "master" and setup.dtype != setup.arithmetic
    if settings["proj_type"] == "full" or (setup.stage < 3 and not keeps_master):
        return False
    rows, columns = shape
    return rows >= columns or setup.parts * settings["rank"] >= 2 * rows


def _sent_in_exchange(shape: Shape, setup: Setup) -> int:
    """Elements of its columns that this rank sends to others, so that all get flat slices (`lock_step.Exchange`)."""
    rows, columns = shape
    first_own, last_own = setup._span(max(shape), setup.rank)
    sent = 0
    for rank in range(setup.parts):
        start, stop = setup._span(rows * columns, rank)
        if rank == setup.rank or stop <= start:
            continue
        first, last = start // columns, -(-stop // columns)
        if rows < columns:
            sent += (last - first) * (last_own - first_own)
        else:
            sent += max(0, min(last, last_own) - max(first, first_own)) * columns
    return sent


# ----------------------------------------------------------------------------------------------------------------- the wire
def bytes_sent(layers: Layers, setup: Setup, *, refresh: bool = False, rotates: bool = True) -> dict[str, int]:
    """Bytes that one rank sends in an update by purpose, with their total. DeepSpeed's own gathers of stage 3 are not among them.

    `gradients` summed (for full-space methods and plain parameters the whole, for others the projected one), `directions` gathered,
    `weights` gathered where slices of them were updated, columns of changes in `exchange` for flat slices, `sums` that state and norms
    need, and what a `refresh` adds: the search for a basis and, where state `rotates` with it, what that asks for.

    Args:
        layers: in the order of backward.
        refresh: all bases are searched for in this update.
        rotates: there are moments already: not so in the first update.
    """
    sent = Counter(sums=_ring(16, setup.ranks, 2))  # loss and norm
    if setup.immediate:
        sent["sums"] += _ring(8, setup.ranks, 2)  # whether the loss is finite
    for layer in layers:
        parameters = [(shape, _completed(settings)) for shape, settings in layer]
        numel = sum(part_on_wire(shape, settings, setup) for shape, settings in layer) + len(layer)
        size = numel * setup.parts * setup.on_wire.itemsize
        sent["gradients"] += setup.reductions * _ring(size, setup.ranks, 1 if setup.parts > 1 else 2)
        if refresh:
            searches = [_search(*p, setup, columns=False) for p in parameters if "rank" in p[1] and not keeps_full_gradient(p[1])]
            sent.update(_rounds(searches, setup, shards=setup.ranks))
        updates = [_update(*p, setup, refresh=refresh, rotates=rotates) for p in parameters]
        sent.update(_rounds(updates, setup, shards=setup.parts))
    return {purpose: sent[purpose] for purpose in PURPOSES} | {"total": sum(sent.values())}


def average_bytes_sent(layers: Layers, setup: Setup) -> dict[str, float]:
    """The mean of `bytes_sent` over many updates in which every basis is refreshed once in its `update_proj_gap`, the same for all."""
    gaps = {settings.get("update_proj_gap", 200) for layer in layers for _, settings in layer if "rank" in settings} or {1}
    assert len(gaps) == 1
    plain, refreshing = bytes_sent(layers, setup), bytes_sent(layers, setup, refresh=True)
    return {purpose: plain[purpose] + (refreshing[purpose] - plain[purpose]) / min(gaps) for purpose in plain}


def weight_gather_bytes(layers: Layers, setup: Setup) -> int:
    """Bytes that one rank sends at stage 3 in an update where DeepSpeed gathers each weight for forward and for backward.

    The most: it keeps small weights, and those that are needed again soon (`stage3_max_reuse_distance`).
    """
    if setup.stage < 3:
        return 0
    each = [setup.share(prod(shape)) * setup.dtype.itemsize for layer in layers for shape, _ in layer]
    return 2 * setup.micro_batches * (setup.ranks - 1) * sum(each)


def textbook_adamw_bytes(layers: Layers, setup: Setup) -> int:
    """Bytes that one rank sends in an update of AdamW under DeepSpeed's ZeRO, its gathers at stage 3 left out (Rajbhandari et al. 2020).

    Stage 0 sums gradients on all ranks, 1 and 2 sum each slice on one and gather weights, 3 does not gather them here.
    """
    size = sum(prod(shape) for layer in layers for shape, _ in layer) * setup.dtype.itemsize
    times = {0: 2, 1: 2, 2: setup.micro_batches + 1, 3: setup.micro_batches}[setup.stage]
    return times * size * (setup.ranks - 1) // setup.ranks


def _ring(size: int, ranks: int, times: int = 1) -> int:
    return times * size * (ranks - 1) // ranks


def _rounds(updates: Iterable[Iterator[_Message]], setup: Setup, *, shards: int) -> Counter[str]:
    """What updates in lock-step send: messages of one round, kind and dtype share a collective."""
    sent: Counter[str] = Counter()
    for together in itertools.zip_longest(*updates):
        alike: dict[tuple[type[Request], torch.dtype], Counter[str]] = {}
        for message in together:
            if message is not None:
                alike.setdefault((message.kind, message.dtype), Counter())[message.purpose] += message.numel * message.dtype.itemsize
        for (kind, _), sizes in alike.items():
            sent.update(_collective(kind, sizes, setup, shards))
    return sent


def _collective(kind: type[Request], sizes: Mapping[str, int], setup: Setup, shards: int) -> dict[str, int]:
    """Bytes of one collective by purpose; what whole bytes leave over is counted to the first."""
    if kind is Publish and setup.stage == 3:
        return {}
    if kind is Flat:
        return dict(sizes)
    if kind in (Columns, Publish):
        return {purpose: (shards - 1) * size for purpose, size in sizes.items()}
    ranks, times = (setup.ranks, 1) if kind is OfFirst else (shards, 2)
    sent = {purpose: _ring(size, ranks, times) for purpose, size in sizes.items()}
    sent[next(iter(sizes))] += _ring(sum(sizes.values()), ranks, times) - sum(sent.values())
    return sent


# ------------------------------------------------------------------------------------------------------------------- memory
def state_bytes_on_rank(shape: Shape, settings: Mapping[str, Any], setup: Setup) -> dict[str, int]:
    """Bytes of optimizer state of one parameter that a rank has, by the kinds of `state_cost`, with their total.

    Sharded are moments, history, column means and master copies; replicated bases, Gram matrix, r x r factors, row means and counters.
    """
    settings = {**DEFAULTS, **settings}
    if "rank" not in settings:
        return expected_state_bytes([setup.own(prod(shape))], settings, setup.dtype)
    sizes, done = expected_state_bytes(shape, settings, setup.dtype), _completed(settings)
    rank, width, arithmetic = _rank_of(shape, done), _width(shape, done), setup.arithmetic.itemsize
    own = setup.own(width)

    def moments(columns: int) -> int:
        both = expected_state_bytes([rank * columns], {"state_dtype": done["state_dtype"]}, setup.dtype)["moments"]
        factor = columns * arithmetic if done["moments"] == "adafactor" else 0
        return STORED_MOMENTS[done["moments"]] * both // 2 + factor

    per_column = {"diagonal": arithmetic}.get(done["fisher"], setup.dtype.itemsize * rank * (done["history"] or 0))
    sizes["moments"] -= moments(width) - moments(own)
    sizes["fisher"] -= (width - own) * per_column
    if sizes["master"]:
        sizes["master"] -= torch.float32.itemsize * (prod(shape) - setup.own(prod(shape)))
    sizes.pop("total")
    return sizes | {"total": sum(sizes.values())}


def sharded_state_bytes(shape: Shape, settings: Mapping[str, Any], setup: Setup) -> int:
    """Bytes of a parameter's state on one process that ZeRO divides among ranks from stage 1 on; the rest is on every rank."""
    alone, none = Setup(0, 1, setup.dtype), Setup(1, 1 << 62, setup.dtype, rank=(1 << 62) - 1)
    return state_bytes_on_rank(shape, settings, alone)["total"] - state_bytes_on_rank(shape, settings, none)["total"]


def memory_per_rank(layers: Layers, setup: Setup) -> dict[str, int]:
    """Bytes on one rank by kind, with their total: weights, optimizer state, gradients kept for the update after they were summed, and
    `buffers`: the largest full gradient and what is on its way between ranks. Not counted: activations, weights that stage 3 has
    gathered, the full gradients of one layer that a refresh keeps for a moment, libraries.
    """
    parameters = [parameter for layer in layers for parameter in layer]
    numels = [prod(shape) for shape, _ in parameters]
    sizes = {
        "weights": setup.dtype.itemsize * sum(setup.share(numel) if setup.stage == 3 else numel for numel in numels),
        "state": sum(state_bytes_on_rank(shape, settings, setup)["total"] for shape, settings in parameters),
        "gradients": 0 if setup.immediate else sum(gradient_bytes(layer, setup) for layer in layers),
        "buffers": setup.dtype.itemsize * max(numels) + buffer_bytes(layers, setup),
    }
    return sizes | {"total": sum(sizes.values())}


def gradient_bytes(layer: Sequence[tuple[Shape, Mapping[str, Any]]], setup: Setup) -> int:
    """Bytes of a layer's gradients that a rank keeps between backward and update, after they were summed.

    Between micro-batches below stage 2 they are not summed yet, and kept in fp32.
    """
    own = sum(part_on_wire(shape, settings, setup) for shape, settings in layer) + len(layer)
    dtype = torch.promote_types(setup.on_wire, torch.float32) if setup.reductions > 1 else setup.on_wire
    if setup.stage < 2 and setup.micro_batches > 1:
        return setup.parts * own * setup.arithmetic.itemsize
    return own * dtype.itemsize


def buffer_bytes(layers: Layers, setup: Setup) -> int:
    """The most bytes of gradients of all ranks together that wait on a rank for their sum.

    Immediate updates have one layer in flight, deferred ones two. Where all of the sum stays on every rank it needs no buffer of its own.
    """
    if setup.parts == 1:
        return 0
    sent = [0]
    for layer in layers:
        part = sum(part_on_wire(shape, settings, setup) for shape, settings in layer) + len(layer)
        sent.append(setup.parts * part * setup.on_wire.itemsize)
    return max(sent) if setup.immediate else max(before + last for before, last in itertools.pairwise(sent))
