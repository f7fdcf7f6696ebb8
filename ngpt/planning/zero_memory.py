"""Buffers between ranks under ZeRO, in bytes on one rank: gradients on their way, directions and weights in an update, gathered weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ngpt.config.schema import RunConfig
from ngpt.engine.zero_cost import Setup, buffer_bytes, keeps_full_gradient
from ngpt.planning.parameters import Parameter

MOST_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
Layer = Sequence[tuple[tuple[int, ...], dict[str, Any]]]


class Wire:
    """Buffers of one layer's collectives (`ngpt.engine.layer_gradients`).

    `gloo`, the CPU's library, receives into a second buffer where NCCL adds up on the way.
    """

    def __init__(self, setup: Setup, *, gloo: bool) -> None:
        self._setup, self._gloo = setup, gloo

    def in_backward(self, layer: Layer) -> int:
        """The layer's gradients of all ranks, waiting for their sum."""
        if not layer:
            return 0
        waiting = buffer_bytes([layer], self._setup)
        thin = any(not keeps_full_gradient(settings) for _, settings in layer)
        return waiting * (1 + self._gloo + thin)

    def in_update(self, layer: Layer) -> int:
        """Columns exchanged for slices, and slices of weights gathered: what is sent and what is received."""
        if self._setup.parts == 1:
            return 0
        size = max((prod(shape) for shape, _ in layer), default=0) * self._setup.on_wire.itemsize
        return 2 * size


def gathered_weight_bytes(config: RunConfig, parameters: list[Parameter], setup: Setup) -> int:
    """The most weights that stage 3 has gathered: with DeepSpeed's own settings a thousand million of them stay until the update."""
    options = config.engine.deepspeed.get("zero_optimization", {})
    most = options.get("stage3_max_live_parameters", MOST_LIVE) if isinstance(options, dict) else MOST_LIVE
    numel = min(sum(parameter.numel for parameter in parameters), int(most))
    return numel * setup.dtype.itemsize
