"""Operations and time of a run on a given device: FLOP by the closed formula, seconds by an assumed share of the device's peak."""

from __future__ import annotations

from dataclasses import dataclass

from ngpt.config.devices import Gpu
from ngpt.config.optimizers import LoRAConfig
from ngpt.config.schema import RunConfig, checkpointing_interval, steps_in_run
from ngpt.model import cost

ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Args:
        steps: updates.
        tokens: positions, all ranks together.
        flops_per_token: forward and backward, as the MFU counts them.
        recomputed_per_token: what activation checkpointing adds.
    """

    steps: int
    tokens: int
    flops_per_token: int
    recomputed_per_token: int

    @property
    def flops(self) -> int:
        return self.tokens * self.flops_per_token

    def seconds(self, peak_flops: float, *, mfu: float, ranks: int) -> float:
        """Time of the updates alone, if `mfu` of the peak is reached by what is computed, recomputation included."""
        return self.tokens * (self.flops_per_token + self.recomputed_per_token) / (peak_flops * mfu * ranks)


def work_of(config: RunConfig) -> Work:
    """The work of a validated configuration."""
    trainer, model = config.trainer, config.model
    steps = steps_in_run(trainer)
    rank = config.optimizer.rank if isinstance(config.optimizer, LoRAConfig) else 0
    every = checkpointing_interval(trainer)
    blocks = -(-model.num_hidden_layers // every) if every else 0
    forward = cost.flops_per_token(model, trainer.seq_len, backward=False, adapter_rank=rank)
    in_blocks = forward - 2 * model.vocab_size * model.hidden_size
    return Work(
        steps=steps,
        tokens=steps * trainer.global_batch_size * trainer.seq_len,
        flops_per_token=cost.flops_per_token(model, trainer.seq_len, adapter_rank=rank),
        recomputed_per_token=in_blocks * blocks // model.num_hidden_layers,
    )


def peak_of(config: RunConfig, gpu: Gpu) -> float:
    """FLOP/s that a run's precision can reach on a GPU; `trainer.peak_flops`, where it is given."""
    return config.trainer.peak_flops or (gpu.fp32 if config.trainer.precision == "fp32" else gpu.bf16)
