"""The optimizers whose steps are timed: ours, torch's, and the published packages where they are installed, each by a name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ngpt import optim

GAP = 10**9  # updates between refreshes: none but the first
Constructor = Callable[[list[Tensor], int], torch.optim.Optimizer]


def ours(method: str, **options: Any) -> Constructor:
    """One of `ngpt.optim`'s low-rank methods, refreshed by the cheap way: a refresh is measured elsewhere."""

    def construct(params: list[Tensor], rank: int) -> torch.optim.Optimizer:
        group = {"params": params, "rank": rank, "update_proj_gap": GAP}
        return getattr(optim, method)([group], **{"subspace": "randomized", **options})

    return construct


def published(package: str, module: str, **options: Any) -> Constructor:
    """`AdamW` of a module of `galore-torch` or `apollo-torch`. Raises ModuleNotFoundError if the package is not installed.

    The package's own `__init__` is left out: it imports bitsandbytes, for 8-bit variants that are not measured.
    """

    def construct(params: list[Tensor], rank: int) -> torch.optim.Optimizer:
        found = importlib.util.find_spec(package)
        if found is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
        sys.modules.setdefault(package, importlib.util.module_from_spec(found))
        group = {"params": params, "rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std", **options}
        return importlib.import_module(f"{package}.{module}").AdamW([group], no_deprecation_warning=True)

    return construct


CONTENDERS: dict[str, Constructor] = {
    "torch AdamW, foreach": lambda params, _: torch.optim.AdamW(params, foreach=True),
    "torch AdamW, fused": lambda params, _: torch.optim.AdamW(params, fused=True),
    "torch Muon": lambda params, _: torch.optim.Muon(params),
    "galore-torch": published("galore_torch", "adamw"),
    "apollo-torch": published("apollo_torch", "apollo", scale=1.0, proj="random", scale_type="channel"),
    "AdamW": lambda params, _: optim.AdamW(params),
    "AdamW, 8-bit": lambda params, _: optim.AdamW(params, state_dtype="8bit"),
    "GaLore": ours("GaLore"),
    "GaLore, bf16 moments": ours("GaLore", state_dtype="bf16"),
    "GaLore, 8-bit moments": ours("GaLore", state_dtype="8bit"),
    "GaLore, Adafactor": ours("GaLore", moments="adafactor"),
    "Fira": ours("GaLore", complement="fira"),
    "Natural, none": ours("NaturalGaLore", fisher="none"),
    "Natural, history": ours("NaturalGaLore", fisher="history"),
    "Natural, two_sided": ours("NaturalGaLore", fisher="two_sided"),
    "Natural, factored": ours("NaturalGaLore", fisher="factored"),
    "Natural, factored, Fira": ours("NaturalGaLore", fisher="factored", complement="fira"),
    "Natural, diagonal": ours("NaturalGaLore", fisher="diagonal"),
    "AdaRankGrad": ours("AdaRankGrad"),
}


def construct_all(
    names: list[str], params_for: Callable[[], list[Tensor]], rank: int
) -> tuple[dict[str, torch.optim.Optimizer], list[str]]:
    """The optimizers that can be constructed, each on parameters of its own, and a line for each that cannot, which says why."""
    built: dict[str, torch.optim.Optimizer] = {}
    missing: list[str] = []
    for name in names:
        try:
            built[name] = CONTENDERS[name](params_for(), rank)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            missing.append(f"{name}: not measured, {type(error).__name__}: {error}")
    return built, missing
