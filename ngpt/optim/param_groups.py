"""Which parameters of a model are projected: parameter groups for GaLore and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngpt.optim.sharding import WHOLE


def low_rank_groups(
    model: nn.Module,
    *,
    rank: int,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    targets: Sequence[str] | None = None,
    embeddings: bool = False,
    shape_of: Callable[[Tensor], torch.Size] = WHOLE.shape,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups of (name, parameter) pairs that hold every trainable parameter once: plain AdamW first, then the projected matrices.

    Projected are the weights of `nn.Linear` layers whose shorter side is above `rank`, but no embedding or head: no weight that an
    `nn.Embedding` shares, and none with a name that has a part ending in "head" or containing "embed". In a LLaMA these are the
    attention and MLP matrices. With `targets`, the matrices whose name contains any of these strings are projected instead, whatever
    their layer. With `embeddings`, embedding and head are projected too, in a third group with scale 1: their step stays as large as
    AdamW's. `shape_of` gives the shape of a parameter where it is not its own, as of one that is partitioned. `options` go to the
    projected groups.

    Raises ValueError if nothing is left to project, a target matches no matrix, or both `targets` and `embeddings` are given.
    """
    if targets is not None and embeddings:
        raise ValueError("give either targets or embeddings=True: targets name all the matrices that are projected")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # a tied weight comes once, under its first name
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    embedded = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    if targets is None:
        low_rank = {name for name, p in named if p in linear - embedded and min(shape_of(p)) > rank and not _is_embedding_or_head(name)}
    else:
        matrices = [name for name, p in named if len(shape_of(p)) == 2]
        unmatched = [target for target in targets if not any(target in name for name in matrices)]
        if unmatched:
            raise ValueError(f"targets {unmatched} match no trainable matrix; the matrices are: {', '.join(matrices) or 'none'}")
        low_rank = {name for name in matrices if any(target in name for target in targets)}
    if not low_rank:
        raise ValueError(
            f"no matrix to project: rank = {rank} must be below the shorter side of at least one linear layer "
            "that is neither embedding nor head (or name some with targets=[...])"
        )
    outer = {name for name, p in named if embeddings and p in linear | embedded and name not in low_rank and min(shape_of(p)) > rank}
    shared = {"rank": rank, "update_proj_gap": update_proj_gap} | options
    groups = [
        {"params": [(name, p) for name, p in named if name not in low_rank | outer]},
        {"params": [(name, p) for name, p in named if name in low_rank], "scale": scale} | shared,
        {"params": [(name, p) for name, p in named if name in outer], "scale": 1.0} | shared,
    ]
    return [group for group in groups if group["params"]]


def _is_embedding_or_head(name: str) -> bool:
    return any(part.endswith("head") or "embed" in part for part in name.lower().split("."))
