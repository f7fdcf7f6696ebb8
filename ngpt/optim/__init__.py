"""The stand-alone optimizer library: depends on torch alone and on no other part of ngpt."""

from ngpt.optim.adamw import AdamW
from ngpt.optim.galore import AdaRankGrad, GaLore, NaturalGaLore
from ngpt.optim.param_groups import low_rank_groups
from ngpt.optim.state import state_bytes

__all__ = ["AdaRankGrad", "AdamW", "GaLore", "NaturalGaLore", "low_rank_groups", "state_bytes"]
