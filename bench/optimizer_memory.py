"""Bytes of optimizer state of every method at the sizes of the GaLore benchmark, as Markdown: `python -m bench.optimizer_memory`.

Counted from shapes by `ngpt.optim.state_cost`, which is tested against real optimizers; nothing is allocated or measured. As in the
benchmark (arXiv:2403.03507, table 2) weights are bf16 without a master copy, moments bf16 unless a row says otherwise, and embedding, head
and norms have AdamW's moments. A GB is 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from bench.presets import model_of
from ngpt.config.schema import ModelConfig
from ngpt.model.cost import matrix_shapes, weight_bytes
from ngpt.optim.state_cost import expected_total

RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}  # the benchmark's: a quarter of the width, a third at 130m
PUBLISHED_GB = {  # weights + states, GaLore's table 2
    "AdamW": {"60m": 0.36, "130m": 0.76, "350m": 2.06, "1b": 7.80},
    "GaLore": {"60m": 0.24, "130m": 0.52, "350m": 1.22, "1b": 4.38},
}
HISTORY_LIMIT = 1.25  # times GaLore's state: what a history may cost


@dataclass(frozen=True)
class Method:
    """Settings of the projected matrices, or none of `rank`; `state_dtype` is for all parameters.

    `embeddings`: embedding and head are projected as well.
    """

    settings: Mapping[str, Any] | None = None
    state_dtype: str = "bf16"
    rank_divisor: int = 1
    adapters: bool = False
    embeddings: bool = False

    def settings_at(self, rank: int) -> dict[str, Any]:
        """Of a projected matrix, at the benchmark's rank."""
        own = {} if self.settings is None else {"rank": rank // self.rank_divisor, **self.settings}
        return {"state_dtype": self.state_dtype, **own}


def _natural(fisher: str, history: int | None = None, **how: Any) -> Method:
    return Method({"fisher": fisher, "history": history}, **how)


METHODS = {
    "AdamW, fp32 moments": Method(state_dtype="fp32"),
    "AdamW": Method(),
    "AdamW, 8-bit": Method(state_dtype="8bit"),
    "LoRA, ReLoRA": Method(adapters=True),
    "GaLore, fp32 moments": Method({}, state_dtype="fp32"),
    "GaLore": Method({}),
    "Fira (`complement=fira`)": Method({"complement": "fira"}),
    "AdaRankGrad": Method({"min_rank": 1}),
    "GaLore, `moments=adafactor`": Method({"moments": "adafactor"}),
    "GaLore, two-sided (`proj_type=full`)": Method({"proj_type": "full"}),
    "GaLore, 8-bit": Method({}, state_dtype="8bit"),
    "Natural GaLore, history, s = 20 (the paper)": _natural("history", 20),
    "Natural GaLore, history, s = 4": _natural("history", 4),
    "Natural GaLore, two_sided, s = 20 (the release)": _natural("two_sided", 20),
    "Natural GaLore, factored": _natural("factored"),
    "Natural GaLore, factored, 8-bit": _natural("factored", state_dtype="8bit"),
    "Natural GaLore, diagonal": _natural("diagonal"),
    "Natural GaLore, diagonal, 8-bit": _natural("diagonal", state_dtype="8bit"),
    "Natural GaLore, diagonal, a quarter of the rank": _natural("diagonal", rank_divisor=4),
    "Natural GaLore, diagonal, a quarter of the rank, 8-bit": _natural("diagonal", rank_divisor=4, state_dtype="8bit"),
    "Natural GaLore, diagonal, `embeddings`": _natural("diagonal", embeddings=True),
    "Natural GaLore, diagonal, `embeddings`, a quarter of the rank": _natural("diagonal", rank_divisor=4, embeddings=True),
}
Parameters = list[tuple[Sequence[int], Mapping[str, Any]]]  # shape and settings


def projected_parameters(method: Method, model: ModelConfig, rank: int) -> Parameters:
    """The matrices of attention and MLP (or their adapters) with their settings."""
    shapes = [(matrix.rows, matrix.columns) for matrix in matrix_shapes(model) if matrix.projected]
    if method.adapters:
        adapters = [shape for rows, columns in shapes for shape in ((rank, columns), (rows, rank))]
        return [(shape, method.settings_at(rank)) for shape in adapters]
    return [(shape, method.settings_at(rank)) for shape in shapes]


def other_parameters(method: Method, model: ModelConfig, rank: int) -> Parameters:
    """Embedding, head and norms."""
    plain = {"state_dtype": method.state_dtype}
    outer = method.settings_at(rank) if method.embeddings else plain
    shapes = [(matrix.rows, matrix.columns) for matrix in matrix_shapes(model) if not matrix.projected]
    norms = [(model.hidden_size,)] * (2 * model.num_hidden_layers + 1)
    return [*((shape, outer) for shape in shapes), *((shape, plain) for shape in norms)]


def state_of(method: Method, size: str, *, projected_only: bool = False) -> dict[str, int]:
    """Bytes of state by kind at a size of the benchmark, of all parameters or of the projected matrices alone."""
    model = model_of(size)
    others = [] if projected_only else other_parameters(method, model, RANKS[size])
    return expected_total(projected_parameters(method, model, RANKS[size]) + others, torch.bfloat16)


def ratio_to_galore(name: str, size: str, *, projected_only: bool = False) -> float:
    """Total state of a method over that of GaLore with bf16 moments."""
    mine, galore = (state_of(METHODS[method], size, projected_only=projected_only)["total"] for method in (name, "GaLore"))
    return mine / galore


def largest_history(fisher: str, size: str, *, projected_only: bool = False) -> int:
    """The most past gradients (0: none) with which the state is at most `HISTORY_LIMIT` times GaLore's.

    A history of s takes A s + B s^2 bytes, so the limit is the positive root of a quadratic.
    """
    with_one = state_of(_natural(fisher, 1), size, projected_only=projected_only)
    with_two = state_of(_natural(fisher, 2), size, projected_only=projected_only)
    limit = HISTORY_LIMIT * state_of(METHODS["GaLore"], size, projected_only=projected_only)["total"]
    square = (with_two["fisher"] - 2 * with_one["fisher"]) // 2
    linear = with_one["fisher"] - square
    budget = int(limit) - (with_one["total"] - with_one["fisher"])
    return (isqrt(linear**2 + 4 * square * budget) - linear) // (2 * square) if budget > 0 else 0


# --------------------------------------------------------------------------------------------------------------------- tables
def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f}" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f}"


def _table(head: str, rows: Iterable[tuple[str, Iterable[str]]], columns: Iterable[str]) -> str:
    columns = list(columns)
    lines = [f"| {' | '.join(line)} |" for line in ([head, *columns], *([name, *cells] for name, cells in rows))]
    return "\n".join([lines[0], "|---" * (1 + len(columns)) + "|", *lines[1:]])


def state_table(*, projected_only: bool) -> str:
    """GB of state and, in parentheses, the ratio to GaLore's."""
    rows = [
        (
            name,
            [
                f"{_gigabytes(state_of(method, size, projected_only=projected_only)['total'])} "
                f"({ratio_to_galore(name, size, projected_only=projected_only):.3f})"
                for size in RANKS
            ],
        )
        for name, method in METHODS.items()
    ]
    return _table("GB (of GaLore's)", rows, [f"{size}, r = {rank}" for size, rank in RANKS.items()])


def history_table() -> str:
    """The largest history within the limit, in both readings."""
    rows = [
        (f"{fisher}, of {what}", [str(largest_history(fisher, size, projected_only=alone)) for size in RANKS])
        for fisher in ("history", "two_sided")
        for what, alone in (("all state", False), ("the projected matrices' state", True))
    ]
    return _table("largest s", rows, RANKS)


def published_table() -> str:
    """Weights and state beside the published sum."""
    rows = []
    for name, published in PUBLISHED_GB.items():
        sums = {size: weight_bytes(model_of(size)) + state_of(METHODS[name], size)["total"] for size in published}
        rows.append((f"{name}, published", [f"{value:.2f}" for value in published.values()]))
        rows.append((f"{name}, counted, GB", [_gigabytes(value) for value in sums.values()]))
        rows.append((f"{name}, counted, GiB", [f"{value / 2**30:.3f}" for value in sums.values()]))
    return _table("weights + state", rows, PUBLISHED_GB["GaLore"])


def report() -> str:
    """All tables."""
    weights = ", ".join(f"{size} {_gigabytes(weight_bytes(model_of(size)))}" for size in RANKS)
    return "\n\n".join(
        [
            f"Weights, GB: {weights}.",
            "State of all parameters:",
            state_table(projected_only=False),
            "State of the projected matrices alone:",
            state_table(projected_only=True),
            f"The largest history whose state is at most {HISTORY_LIMIT} x GaLore's:",
            history_table(),
            "Beside the published figures (arXiv:2403.03507, table 2):",
            published_table(),
        ]
    )


if __name__ == "__main__":
    print(report())
