"""Buffers between ranks and temporaries of an update under ZeRO, in bytes on one rank: what `ngpt.engine` keeps for its collectives.

Letters: N parts (1 at stage 0, else ranks), n numbers of a parameter, l of its projected gradient, w bytes of a weight, v of a number on
the wire, d of one in the buffer in which a layer's gradients are packed: 4 where it adds up micro-batches (below stage 2), else v. The
updates of a layer run side by side (`ngpt.engine.lock_step`): what each holds at a round is added up, what each needs between two rounds
comes one after the other. A method that keeps full gradients is called whole here, one that projects them at once thin.
"""

from __future__ import annotations

from collections.abc import Sequence

from ngpt.config.schema import RunConfig
from ngpt.engine.lock_step import LARGE
from ngpt.engine.zero_cost import Setup, keeps_full_gradient, lifts_columns, part_on_wire
from ngpt.optim.state_cost import DEFAULTS
from ngpt.planning.parameters import Parameter
from ngpt.planning.update_memory import ROUNDED, Arithmetic, apply_bytes, low_numel, search_bytes

MOST_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
PREFETCHED = 50_000_000  # and its stage3_prefetch_bucket_size
FP32 = 4


class Wire:
    """Buffers of the collectives of a layer's gradients (`ngpt.engine.layer_gradients`).

    `gloo`, the CPU's library, receives into a second buffer where NCCL adds up on the way.
    """

    def __init__(self, setup: Setup, *, gloo: bool) -> None:
        self._setup, self._gloo = setup, gloo
        self._v = setup.on_wire.itemsize
        self._d = FP32 if setup.stage < 2 and setup.micro_batches > 1 else self._v

    def arriving(self, layer: Sequence[Parameter], *, first: bool) -> int:
        """While gradients of a layer come: N (n + 1) d of the whole ones; thin ones projected, or full until a basis is found in them."""
        thin = _thin(layer)
        waiting = sum(p.numel * self._setup.dtype.itemsize for p in thin) if first else sum(FP32 * low_numel(p) for p in thin)
        return self._room(layer) + waiting

    def starting(self, layer: Sequence[Parameter]) -> int:
        """While the sum is started: what is packed; joined with projected ones; as it is sent; as it is received."""
        sent, received = self._sent(layer), self._received(layer)
        if not _thin(layer):
            return self._room(layer) + received + (0 if self._d == self._v else sent)
        packed = self._setup.parts * self._d * self._part(layer)
        converted = 0 if self._d == self._v else sent
        return packed + max(packed + converted, sent + received)

    def flying(self, layer: Sequence[Parameter]) -> int:
        """From then on until somebody waits for the sum: N n v sent, and room for what comes."""
        return self._sent(layer) + self._received(layer)

    def collected(self, layer: Sequence[Parameter]) -> int:
        """When the sum has come, and what was sent is still there."""
        return self.flying(layer) + (self.own(layer) if self._gloo and self._setup.parts > 1 else 0)

    def own(self, layer: Sequence[Parameter]) -> int:
        """This rank's part of the sum of one micro-batch."""
        return self._v * self._part(layer)

    def _part(self, layer: Sequence[Parameter]) -> int:
        return sum(part_on_wire(p.shape, p.settings or {}, self._setup) for p in layer) + len(layer)

    def _room(self, layer: Sequence[Parameter]) -> int:
        whole = sum(part_on_wire(p.shape, p.settings or {}, self._setup) for p in layer if p not in _thin(layer))
        return self._setup.parts * self._d * (whole + len(layer))

    def _sent(self, layer: Sequence[Parameter]) -> int:
        return self._setup.parts * self.own(layer)

    def _received(self, layer: Sequence[Parameter]) -> int:
        if self._setup.parts == 1:
            return 0
        return self._sent(layer) if self._gloo else self.own(layer)


def keeps_matrices(layer: Sequence[Parameter]) -> bool:
    """Whether full gradients of matrices travel: then those of one layer are on their way at a time, else of two."""
    return any(len(p.shape) > 1 for p in layer if p not in _thin(layer))


class LayerUpdate:
    """Temporaries of the updates of one layer's parameters."""

    def __init__(self, setup: Setup, arithmetic: Arithmetic) -> None:
        self._setup, self._arithmetic = setup, arithmetic
        self._w, self._v = arithmetic.w, setup.on_wire.itemsize

    def search(self, layer: Sequence[Parameter]) -> int:
        """Inside backward, when all full gradients of a layer wait for bases: joined in fp32, then searched one by one.

        Exact singular vectors of each stay until all have theirs.
        """
        thin = _thin(layer)
        joined = sum(FP32 * p.numel for p in thin)
        widened = joined if self._w < FP32 else 0
        vectors = sum(FP32 * min(p.shape) ** 2 for p in thin if self._setting(p, "subspace") == "svd" and not self._setting(p, "stagger"))
        wide = Arithmetic(self._setup.arithmetic, self._arithmetic.on_gpu)
        return joined + max(widened, vectors + max((search_bytes(p, wide) for p in thin), default=0))

    def applied(self, layer: Sequence[Parameter]) -> int:
        """The update itself."""
        plain = [p for p in layer if "rank" not in (p.settings or {})]
        thin, whole = _thin(layer), [p for p in layer if "rank" in (p.settings or {}) and p not in _thin(layer)]
        return max(
            max((apply_bytes(self._slice(p), self._arithmetic) for p in plain), default=0),
            self._published(plain),
            self._thin(thin) if thin else 0,
            self._whole(whole) if whole else 0,
        )

    # ------------------------------------------------------------------------------------------------ the kinds of methods
    def _thin(self, layer: Sequence[Parameter]) -> int:
        """Directions, 4 l / N, are gathered as l v and lifted on every rank, or lifted here and exchanged for slices."""
        parts = self._setup.parts
        low = sum(low_numel(p) for p in layer)
        mine = FP32 * low // parts if self._v < FP32 else 0  # fp32 copies of what was summed
        if parts == 1 and self._setup.stage < 3:
            return mine + max(apply_bytes(p, self._arithmetic) for p in layer)
        state = mine + FP32 * low // parts
        gathering = [p for p in layer if not lifts_columns(p.shape, self._completed(p), self._setup)]
        exchanging = [p for p in layer if p not in gathering]
        flat = sum(p.numel for p in exchanging) // parts
        gathered = sum(low_numel(p) for p in gathering)
        columns = self._v * gathered // parts + (self._v + FP32) * gathered
        if self._setup.stage == 3:
            lifted = FP32 * sum(p.numel for p in gathering) // parts
            applied = max(self._slice_bytes(p) for p in layer)
            return state + max(columns, FP32 * gathered + lifted + applied, self._exchanged(flat, FP32), FP32 * flat + applied)
        return state + max(columns, FP32 * gathered + max((apply_bytes(p, self._arithmetic) for p in layer), default=0))

    def _whole(self, layer: Sequence[Parameter]) -> int:
        """Changes of 4 n / N stay from the first round to the last: exchanged for slices, which are applied and published."""
        parts, numel = self._setup.parts, sum(p.numel for p in layer)
        changes, states = FP32 * numel // parts, 3 * FP32 * sum(low_numel(p) for p in layer) // parts
        if parts == 1:
            return changes + states + max(0, *(apply_bytes(p, self._arithmetic) - FP32 * p.numel for p in layer))
        exchanged = changes + self._exchanged(numel // parts, FP32)
        published = changes + FP32 * numel // parts + max(self._published(layer), *(self._slice_bytes(p) for p in layer))
        return states + max(exchanged, published, self._searched_in_columns(layer))

    def _searched_in_columns(self, layer: Sequence[Parameter]) -> int:
        """Where a search needs all columns: sent, gathered, and put side by side, in the dtype of the sum."""
        numel = sum(p.numel for p in layer if self._setting(p, "subspace") == "svd" or self._setting(p, "stagger"))
        dtype = FP32 if self._setup.reductions > 1 else self._v
        largest = max(search_bytes(p, self._arithmetic) for p in layer)
        return dtype * numel + max(dtype * (numel + numel // self._setup.parts), largest if numel else 0)

    # -------------------------------------------------------------------------------------------------------- its exchanges
    def _exchanged(self, numel: int, of_change: int) -> int:
        """Columns of changes as they are, rounded for the wire, by receivers, joined and received; then as slices, in fp32 again."""
        narrow = self._v < FP32
        rounded = self._v * numel if narrow else 0
        answer = (self._v + FP32) * numel if narrow else FP32 * numel
        return of_change * numel + rounded + 2 * self._v * numel + max(self._v * numel, answer)

    def _published(self, layer: Sequence[Parameter]) -> int:
        """Slices of small weights are copied, joined and gathered; large ones are gathered where they lie."""
        if self._setup.stage not in (1, 2) or self._setup.parts == 1:
            return 0
        parts = self._setup.parts
        small = [p for p in layer if p.numel < LARGE or p.numel % parts]
        return sum(self._w * self._setup.share(p.numel) * (2 + parts) for p in small)

    def _slice_bytes(self, p: Parameter) -> int:
        """A slice of a projected matrix, while a change is added to it: all of it at once."""
        settings, narrow = self._completed(p), self._w < FP32
        widened = FP32 if narrow and settings["rounding"] != "master" else 0
        rounded = ROUNDED if narrow and settings["rounding"] == "stochastic" else 0
        return self._setup.share(p.numel) * (widened + max(rounded, 2 * self._w if self._arithmetic.guarded else 0))

    def _slice(self, p: Parameter) -> Parameter:
        return p if self._setup.parts == 1 else Parameter(p.name, (self._setup.share(p.numel),), _as_plain(p))

    def _setting(self, p: Parameter, name: str) -> object:
        return self._completed(p)[name]

    @staticmethod
    def _completed(p: Parameter) -> dict[str, object]:
        return {**DEFAULTS, "subspace": "svd", "stagger": False, **(p.settings or {})}


def gathered_weight_bytes(config: RunConfig, parameters: list[Parameter], setup: Setup) -> tuple[int, int]:
    """Of weights that stage 3 has gathered: the most at one time, and a buffer of those that are fetched ahead.

    With DeepSpeed's own settings a thousand million weights stay until the update. 50 million at a time are fetched ahead into a buffer,
    and copied from there; where micro-batches follow each other it stays until the loss.
    """
    if setup.stage < 3:
        return 0, 0
    options = config.engine.deepspeed.get("zero_optimization", {})
    options = options if isinstance(options, dict) else {}
    numel = sum(parameter.numel for parameter in parameters)
    live = min(numel, int(options.get("stage3_max_live_parameters", MOST_LIVE)))
    ahead = min(numel, int(options.get("stage3_prefetch_bucket_size", PREFETCHED)))
    return live * setup.dtype.itemsize, ahead * setup.dtype.itemsize


def _thin(layer: Sequence[Parameter]) -> list[Parameter]:
    return [p for p in layer if not keeps_full_gradient(p.settings or {})]


def _as_plain(p: Parameter) -> dict[str, object]:
    return {key: value for key, value in (p.settings or {}).items() if key in ("state_dtype", "rounding")}
