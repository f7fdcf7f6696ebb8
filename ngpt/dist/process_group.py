"""Ranks, device and seed of this process; the only reader of RANK, WORLD_SIZE and LOCAL_RANK."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Ranks:
    """Place of this process among its peers: `rank` of `world_size`, and `local_rank` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Read what torchrun and deepspeed set; a plain `python` is rank 0 of 1."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def choose_device(requested: str, ranks: Ranks) -> torch.device:
    """The device that `trainer.device` names. Raises ValueError where it asks for a GPU that is not there."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "trainer.device = cuda: torch sees no NVIDIA GPU here; use trainer.device=auto, "
            "or install a CUDA build of torch and check `nvidia-smi`"
        )
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def seed_everything(seed: int) -> None:
    """Seed every global generator that a library below us might draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, object]:
    """State of torch's generators and Python's, in types that `torch.load(weights_only=True)` reads.

    Nothing of ours draws from them after the weights are drawn (data order and rounding have seeds of their own); they are
    kept so that a user's own dropout or augmentation resumes exactly too.
    """
    version, internal, gauss = random.getstate()
    state: dict[str, object] = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, object]) -> None:
    """Restore what `random_state` returned; a CUDA state is ignored where there is no GPU."""
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    version, internal, gauss = state["python"]  # type: ignore[misc]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])  # type: ignore[arg-type]
