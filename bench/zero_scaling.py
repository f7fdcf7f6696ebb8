"""Memory per GPU and bytes on the wire of 60M to 7B on 1 to 1024 GPUs under ZeRO, as Markdown: `python -m bench.zero_scaling`.

Counted from shapes by `ngpt.engine.zero_cost`, which tests hold to be what real updates send and keep; nothing is allocated or measured.
Weights, gradients on the wire and moments are bf16, without master copies; ranks are GaLore's (a quarter of the width, a third at 130m),
bases are refreshed every 200 updates; embedding, head and norms have AdamW. One micro-batch an update unless said. A GB is 1e9 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.optimizer_memory import RANKS
from bench.presets import block_shapes, model_of
from ngpt.engine.zero_cost import Layers, Setup, average_bytes_sent, memory_per_rank, textbook_adamw_bytes, weight_gather_bytes
from ngpt.model.cost import matrix_shapes

SIZES = tuple(RANKS)
MANY = (1, 2, 8, 64, 1024)
LARGEST = "7b"
PLAIN = {"state_dtype": "bf16"}
METHODS: dict[str, Mapping[str, Any] | None] = {
    "AdamW": None,
    "GaLore": {},
    "Natural GaLore, history, s = 4": {"fisher": "history", "history": 4},
    "Natural GaLore, factored": {"fisher": "factored"},
    "Natural GaLore, diagonal": {"fisher": "diagonal"},
}


def layers_of(method: str, size: str) -> Layers:
    """All parameters of a model, by layers, in the order of backward."""
    model, parts = model_of(size), METHODS[method]
    projected = PLAIN if parts is None else {**PLAIN, "rank": RANKS[size], "subspace": "randomized", **parts}
    norm = ((model.hidden_size,), PLAIN)
    block = [*((shape, projected) for shape in block_shapes(model)), norm, norm]
    outer = [((matrix.rows, matrix.columns), PLAIN) for matrix in matrix_shapes(model) if not matrix.projected]
    return [[outer[-1]], [norm], *[block] * model.num_hidden_layers, *([[outer[0]]] if len(outer) > 1 else [])]


@functools.cache
def memory(method: str, size: str, setup: Setup) -> dict[str, int]:
    """Bytes per GPU by kind."""
    return memory_per_rank(layers_of(method, size), setup)


@functools.cache
def wire(method: str, size: str, setup: Setup) -> dict[str, float]:
    """Bytes that a GPU sends in an update, by purpose."""
    return average_bytes_sent(layers_of(method, size), setup)


def projected_share(method: str, size: str, setup: Setup) -> float:
    """Bytes that the matrices of a block send, over those of the textbook's AdamW under the same ZeRO."""
    block = [layers_of(method, size)[2][:7]]
    return average_bytes_sent(block, setup)["total"] / textbook_adamw_bytes(block, setup)


# --------------------------------------------------------------------------------------------------------------------- tables
def _gigabytes(size: float) -> str:
    if size < 1e6:
        return "< 0.001" if size else "0"
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.2f}" if size < 1e11 else f"{size / 1e9:.0f}"


def _table(head: str, columns: Iterable[Any], rows: Iterable[str], cell: Callable[[str, Any], str]) -> str:
    columns = list(columns)
    lines = [[head, *map(str, columns)], ["---"] * (1 + len(columns)), *([row, *(cell(row, column) for column in columns)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")


def state_by_ranks(size: str) -> str:
    """GB of optimizer state of one rank at stages 1 to 3."""
    return _table(f"{size}, GPUs", MANY, METHODS, lambda method, ranks: _gigabytes(memory(method, size, Setup(1, ranks))["state"]))


def memory_by_stage(size: str, ranks: int, micro_batches: int) -> str:
    """GB of weights, state, gradients and buffers."""
    return _table(
        f"{size}, {ranks} GPUs, {micro_batches} micro-batches",
        [f"stage {stage}" for stage in range(4)],
        METHODS,
        lambda method, stage: _gigabytes(memory(method, size, Setup(int(stage[-1]), ranks, micro_batches=micro_batches))["total"]),
    )


def memory_by_kind(size: str, stage: int, ranks: int) -> str:
    """What the sum is made of."""
    return _table(
        f"{size}, stage {stage}, {ranks} GPUs",
        ("weights", "state", "gradients", "buffers", "total"),
        METHODS,
        lambda method, kind: _gigabytes(memory(method, size, Setup(stage, ranks))[kind]),
    )


def wire_by_size(ranks: int) -> str:
    """GB that a rank sends in an update at stages 1 and 2."""
    return _table(
        f"stage 1, {ranks} GPUs",
        SIZES,
        METHODS,
        lambda method, size: _gigabytes(wire(method, size, Setup(1, ranks))["total"]),
    )


def wire_by_purpose(size: str, stage: int, ranks: int) -> str:
    """GB that a rank sends in an update, by what they are for."""
    return _table(
        f"{size}, stage {stage}, {ranks} GPUs",
        ("gradients", "directions", "weights", "exchange", "sums", "refresh", "total"),
        METHODS,
        lambda method, purpose: _gigabytes(wire(method, size, Setup(stage, ranks))[purpose]),
    )


def wire_by_stage(size: str, ranks: int, micro_batches: int) -> str:
    """GB that a rank sends in an update of several micro-batches; in the last column what DeepSpeed's gathers of weights add at stage 3."""

    def cell(method: str, column: str) -> str:
        if column == "gathers at stage 3":
            return _gigabytes(weight_gather_bytes(layers_of(method, size), Setup(3, ranks, micro_batches=micro_batches)))
        return _gigabytes(wire(method, size, Setup(int(column[-1]), ranks, micro_batches=micro_batches))["total"])

    columns = [*(f"stage {stage}" for stage in range(4)), "gathers at stage 3"]
    return _table(f"{size}, {ranks} GPUs, {micro_batches} micro-batches", columns, METHODS, cell)


def shares_of_projected(stage: int, sizes: Sequence[str]) -> str:
    """Bytes of the projected matrices over those of AdamW."""
    columns = [f"{size}, {ranks} GPUs" for size in sizes for ranks in (2, 64)]

    def cell(method: str, column: str) -> str:
        size, ranks = column.removesuffix(" GPUs").split(", ")
        return f"{projected_share(method, size, Setup(stage, int(ranks))):.3f}"

    return _table(f"stage {stage}", columns, METHODS, cell)


def report() -> str:
    """All tables."""
    shares = ", ".join(f"{size} {RANKS[size] / model_of(size).hidden_size:.3f}" for size in SIZES)
    return "\n\n".join(
        [
            "Optimizer state per GPU at stages 1 to 3, GB (at stage 0 every GPU has that of the first column):",
            *(state_by_ranks(size) for size in SIZES),
            "All that is counted, GB per GPU:",
            memory_by_stage("60m", 2, 4),
            memory_by_stage("1b", 8, 4),
            memory_by_stage(LARGEST, 8, 4),
            memory_by_stage(LARGEST, 64, 4),
            "What it is made of, with one micro-batch, GB per GPU:",
            memory_by_kind(LARGEST, 2, 8),
            memory_by_kind(LARGEST, 3, 64),
            "Sent by a GPU in an update, mean over the updates between two refreshes, GB. It hardly depends on the number of GPUs:",
            wire_by_size(8),
            wire_by_size(1024),
            "What it is for, GB:",
            wire_by_purpose(LARGEST, 1, 8),
            "By stage, where gradients are accumulated, GB:",
            wire_by_stage(LARGEST, 64, 4),
            f"The projected matrices alone, over what AdamW sends for them under the same ZeRO (r/m: {shares}):",
            shares_of_projected(1, ("60m", "1b", LARGEST)),
            shares_of_projected(3, ("60m", "1b", LARGEST)),
        ]
    )


if __name__ == "__main__":
    print(report())
