"""The methods of the race: for each a name, a class, its arguments and the middle of its learning-rate sweep.

A method updates the attention and MLP matrices; embedding, head and norms always get AdamW at a rate common to all methods. For every
method the rate is what multiplies the direction (scale = 1), so that rates of one kind of direction can be compared.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ngpt.optim import AdamW

LIBRARIES = ("ngpt.optim", "bench.rivals", "torch.optim")
BETAS = (0.9, 0.99)  # of every Adam, unless a method says otherwise


@dataclass(frozen=True)
class Method:
    """`rank` is a number, or a share of the model's width such as "d/4". `embeddings`: embedding and head are the method's as well."""

    optimizer: str
    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    rank: int | str | None = None
    rest_options: dict[str, Any] = field(default_factory=dict)
    embeddings: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _low_rank(optimizer: str, rank: int | str = "d/4", *, rate: float = 0.005, embeddings: bool = False, **options: Any) -> Method:
    return Method(optimizer, rate, {"betas": BETAS, "scale": 1.0, **options}, rank, embeddings=embeddings)


def _natural(fisher: str, rank: int | str = "d/4", **options: Any) -> Method:
    return _low_rank("NaturalGaLore", rank, fisher=fisher, **options)


METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", 0.004, {"betas": BETAS, "weight_decay": 0.0}),
    "galore": _low_rank("GaLore", subspace="svd", on_refresh="keep"),
    "natural_diagonal": _natural("diagonal"),
    "natural_diagonal_d16": _natural("diagonal", "d/16"),
    "natural_history": _natural("history", history=20),
    "fira": _low_rank("GaLore", subspace="svd", on_refresh="keep", complement="fira"),
    "muon": Method("Muon", 0.008, {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}),
    "racs": Method("RACS", 0.005),
    "foam": Method("FOAM", 0.005),
    "apollo": Method("APOLLO", 0.008, {"betas": BETAS}, "d/4"),
    "apollo_mini": Method("APOLLO", 0.008, {"betas": BETAS, "per": "tensor", "alpha": 128.0}, 1),
    "fira_published": Method("PublishedFira", 0.01, {"betas": BETAS}, "d/4"),
    "galore_rotate": _low_rank("GaLore", subspace="svd", on_refresh="rotate"),
    "galore_fira_rotate": _low_rank("GaLore", subspace="randomized", on_refresh="rotate", complement="fira"),
    "natural_factored": _natural("factored"),
    "natural_factored_fira": _natural("factored", complement="fira"),
    "natural_two_sided": _natural("two_sided", history=20, on_refresh="keep"),
    "natural_history_s4": _natural("history", history=4),
    "natural_none": _natural("none"),
    "natural_diagonal_r1": _natural("diagonal", 1),
    "natural_diagonal_bare": _natural("diagonal", complement="none"),
    "natural_diagonal_all": _natural("diagonal", embeddings=True),
    "natural_diagonal_8bit": replace(_natural("diagonal", state_dtype="8bit"), rest_options={"state_dtype": "8bit"}),
    "adarankgrad": _low_rank("AdaRankGrad"),
    "galore_d16": _low_rank("GaLore", "d/16", subspace="svd", on_refresh="keep"),
    "fira_d16": _low_rank("GaLore", "d/16", subspace="svd", on_refresh="keep", complement="fira"),
    "natural_history_d16": _natural("history", "d/16", history=20),
    "natural_factored_d16": _natural("factored", "d/16"),
    "natural_factored_fira_d16": _natural("factored", "d/16", complement="fira"),
    "adarankgrad_d16": _low_rank("AdaRankGrad", "d/16"),
    "adamw_b999": Method("AdamW", 0.004, {"betas": (0.9, 0.999), "weight_decay": 0.0}),
    "adamw_b95": Method("AdamW", 0.004, {"betas": (0.9, 0.95), "weight_decay": 0.0}),
    "scale": Method("SCALE", 0.005),
}


class Racer:
    """The two optimizers of a run: the method's on the matrices, AdamW on the rest.

    Raises ValueError if the method's class does not exist, or does not take its arguments.
    """

    def __init__(self, method: dict[str, Any], model: nn.Module, *, width: int, rate: float, rest_rate: float, gap: int) -> None:
        named = dict(model.named_parameters())
        inner = [name for name, p in named.items() if p.ndim == 2 and ".layers." in name]
        outer = [name for name, p in named.items() if p.ndim == 2 and name not in inner] if method["embeddings"] else []
        self.matrices = [named[name] for name in inner]
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in method["options"].items()}
        shared = {"rank": _rank(method["rank"], width), "update_proj_gap": gap} if method["rank"] else {}
        groups = [{"params": [named[n] for n in names], "lr": lr} | shared for names, lr in ((inner, rate), (outer, rest_rate)) if names]
        rest = [p for name, p in named.items() if name not in {*inner, *outer}]
        self.optimizers = [
            _build(method["optimizer"], groups, {"lr": rate} | options, shared),
            AdamW(rest, lr=rest_rate, betas=BETAS, weight_decay=0.0, **method["rest_options"]),
        ]
        self._peaks = [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, rate_factor: float) -> None:
        """One update at `rate_factor` times the peak rates; clears the gradients."""
        for group, peak in zip(self._groups(), self._peaks, strict=True):
            group["lr"] = peak * rate_factor
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_bytes(self) -> dict[str, int]:
        """Bytes of every tensor in the state: of all parameters, and of the attention and MLP matrices alone."""
        sizes = {p: sum(map(_bytes, state.values())) for optimizer in self.optimizers for p, state in optimizer.state.items()}
        return {"all": sum(sizes.values()), "matrices": sum(sizes.get(p, 0) for p in self.matrices)}


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _rank(rank: int | str, width: int) -> int:
    return rank if isinstance(rank, int) else max(1, width // int(rank.removeprefix("d/")))


def _build(name: str, groups: list[dict[str, Any]], options: dict[str, Any], shared: dict[str, Any]) -> torch.optim.Optimizer:
    for library in LIBRARIES:
        optimizer = getattr(importlib.import_module(library), name, None)
        if optimizer is None:
            continue
        try:
            return optimizer(groups, **options, **(shared if library == "bench.rivals" else {}))
        except TypeError as error:
            raise ValueError(f"{name} does not take these arguments: {error}") from error
    raise ValueError(f"there is no optimizer {name} in {', '.join(LIBRARIES)}")
