"""The low-rank optimizers that users meet: GaLore, Natural GaLore and AdaRankGrad, each a choice of parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ngpt.optim.low_rank import LowRankAdamW
from ngpt.optim.sharding import WHOLE, Sharding

FIXED_RANK = {"min_rank": None, "energy": 1.0, "converged_below": 0.0}
NO_FISHER = {"fisher": "none", "history": None, "damping": 1e-3}


class GaLore(LowRankAdamW):
    """GaLore (arXiv:2403.03507). With the defaults, the published `GaLoreAdamW` on projected groups.

    Group keys `rank` (an integer below both dimensions, or "full"), `update_proj_gap`, `scale` and `proj_type` ("std": the shorter side
    is projected; "full": both are) as in GaLore's package; groups without `rank` are updated exactly as by torch.optim.AdamW (GaLore's
    package has eps and weight decay in another order there).

    `subspace`: "svd", "randomized" or "random" (it does not look at the gradient). `on_refresh`, what happens to the moments when the
    basis changes: "keep" (published), "rotate" or "reset". `moments`: "adam", "adafactor" (a factored second moment) or "momentum".
    `complement`: "fira" adds back what the projection dropped (arXiv:2410.01623), which needs the full gradient at the update. `stagger`
    spreads the refreshes of the matrices over the updates between two refreshes. See `AdamW` for `state_dtype`, `rounding` and `seed`. All
    keywords may be set by group. Raises ValueError for values that break a rule or do not go together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace: str = "svd",
        on_refresh: str = "keep",
        stagger: bool = False,
        moments: str = "adam",
        complement: str = "none",
        state_dtype: str = "fp32",
        rounding: str = "stochastic",
        seed: int = 0,
        sharding: Sharding = WHOLE,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self._set_up(params, options | NO_FISHER | FIXED_RANK)

    def accepted_keys(self) -> set[str]:
        return super().accepted_keys() - NO_FISHER.keys() - FIXED_RANK.keys()


class NaturalGaLore(LowRankAdamW):
    """Natural GaLore (arXiv:2410.16029): GaLore on natural gradients, with a choice of how the Fisher is kept.

    `fisher`:
        "history": damping * I + H H' of the last `history` projected gradients of each matrix, 20 unless given (the paper);
        "two_sided": the same with both sides projected (the authors' release);
        "factored": an r x r EMA of R R', inverted as a damped square root;
        "diagonal": row and column means of the squared full gradient; it takes the place of the second moment, so that `moments` is
            "momentum", and what the projection dropped is added back ("raw" `complement`). Needs the full gradient at the update;
        "none": GaLore.
    `damping` is absolute for the first two, relative to the mean of the Fisher for the others. The other arguments are those of
    `GaLore`, with the defaults that this library recommends. Raises ValueError for values that break a rule or do not go together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        fisher: str = "diagonal",
        history: int | None = None,
        damping: float = 1e-3,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace: str = "randomized",
        on_refresh: str = "rotate",
        stagger: bool = True,
        moments: str | None = None,
        complement: str | None = None,
        state_dtype: str = "fp32",
        rounding: str = "stochastic",
        seed: int = 0,
        sharding: Sharding = WHOLE,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self._set_up(params, options | FIXED_RANK)

    def accepted_keys(self) -> set[str]:
        return super().accepted_keys() - FIXED_RANK.keys()


class AdaRankGrad(LowRankAdamW):
    """AdaRankGrad (arXiv:2410.17881): GaLore whose rank adapts to the gradient, with moments that follow the basis.

    At each refresh the rank of a matrix becomes the smallest that keeps the share `energy` of the squared gradient, between `min_rank`
    and the group's `rank`. A refresh comes every `update_proj_gap` updates, and when the projected gradient has converged: its norm is
    below `converged_below` of what it was at the last refresh (0: never), looked at every 10 updates.

    State is allocated for the largest rank, `rank`, and stays so: a smaller rank saves time and communication. The rank in use is
    `state[p]["rank"]`. The other arguments are those of `GaLore`. Raises ValueError for values that break a rule or do not go together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        min_rank: int = 1,
        energy: float = 0.96,
        converged_below: float = 0.5,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        subspace: str = "randomized",
        on_refresh: str = "rotate",
        stagger: bool = True,
        moments: str = "adam",
        complement: str = "none",
        state_dtype: str = "fp32",
        rounding: str = "stochastic",
        seed: int = 0,
        sharding: Sharding = WHOLE,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self._set_up(params, options | NO_FISHER | {"proj_type": "std"})

    def accepted_keys(self) -> set[str]:
        return super().accepted_keys() - NO_FISHER.keys() - {"proj_type"}
