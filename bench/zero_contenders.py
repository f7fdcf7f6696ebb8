"""What bench/zero.py compares: our engine with each optimizer, and DeepSpeed's own ZeRO with torch's AdamW, all taking the same steps."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ngpt.config.schema import ModelConfig
from ngpt.dist.collectives import Collectives
from ngpt.engine.deepspeed_config import deepspeed_config
from ngpt.engine.deepspeed_contract import check_deepspeed
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import AdamW, GaLore, NaturalGaLore, low_rank_groups
from ngpt.optim.sharding import Sharding

PEER = "DeepSpeed, AdamW"
LR = 1e-3
STEADY_GAP = 10**9  # updates between refreshes: none but the first


@dataclass(frozen=True)
class Setup:
    """What all contenders have in common. `matrices_only` freezes all weights but the blocks' matrices, the ones that are projected."""

    model: ModelConfig
    stage: int
    rank: int
    rows: int
    seq_len: int
    device: str = "cpu"
    matrices_only: bool = False
    apply: str = "deferred"
    gap: int = STEADY_GAP

    @property
    def dtype(self) -> torch.dtype:
        """Of weights: fp32 on the CPU, bf16 on a GPU."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def torch_device(self) -> torch.device:
        """The device of this rank."""
        return torch.device(self.device, torch.cuda.current_device()) if self.device == "cuda" else torch.device(self.device)


class StateBytes(NamedTuple):
    """Optimizer state of one rank: `sharded` of `sharded_whole` on all ranks together, and what each rank has whole."""

    sharded: int
    sharded_whole: int
    replicated: int

    @property
    def total(self) -> int:
        return self.sharded + self.replicated


class Contender(Protocol):
    """One model in training on this rank."""

    def backward(self) -> Tensor:
        """Forward and backward of one micro-batch. Returns this rank's share of the loss."""
        ...

    def update(self, loss: Tensor) -> float:
        """The rest of the step. Returns the mean loss: DeepSpeed's of this rank, ours of all."""
        ...

    def weight_bytes_sent(self, sent: Mapping[str, int]) -> int:
        """Bytes that this rank sent since the last call so that weights could be gathered, of all that it `sent` by kind."""
        ...

    def state_bytes(self) -> StateBytes: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------------------------------------------------------- model
def build_model(setup: Setup) -> LlamaForCausalLM:
    """The same weights for everybody, fp32 on the CPU."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(setup.model, loss_chunk_tokens=1024)
    if setup.matrices_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_block_matrix(name))
    return model


def is_block_matrix(name: str) -> bool:
    """Whether this is the name of a matrix of attention or MLP."""
    return ".self_attn." in name or ".mlp." in name


def tokens_of(setup: Setup, rank: int) -> dict[str, Tensor]:
    """Inputs of a micro-batch: noise, another one on each rank."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(setup.model.vocab_size, (setup.rows, setup.seq_len + 1), generator=generator).to(setup.torch_device)
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


# ------------------------------------------------------------------------------------------------------------------ ours
def _adamw(model: nn.Module, sharding: Sharding, setup: Setup) -> AdamW:
    return AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=LR, sharding=sharding, **_rounding(setup))


def _galore(model: nn.Module, sharding: Sharding, setup: Setup) -> AdamW:
    return GaLore(_groups(model, sharding, setup), lr=LR, subspace="randomized", stagger=False, sharding=sharding, **_rounding(setup))


def _natural(model: nn.Module, sharding: Sharding, setup: Setup, **options: Any) -> AdamW:
    return NaturalGaLore(_groups(model, sharding, setup), lr=LR, stagger=False, sharding=sharding, **_rounding(setup), **options)


def _groups(model: nn.Module, sharding: Sharding, setup: Setup) -> list[dict[str, Any]]:
    return low_rank_groups(model, rank=setup.rank, update_proj_gap=setup.gap, shape_of=sharding.shape)


def _rounding(setup: Setup) -> dict[str, Any]:
    return {} if setup.dtype == torch.float32 else {"rounding": "stochastic"}


OURS: dict[str, Callable[[nn.Module, Sharding, Setup], AdamW]] = {
    "AdamW": _adamw,
    "GaLore": _galore,
    "Natural, history": functools.partial(_natural, fisher="history"),
    "Natural, factored": functools.partial(_natural, fisher="factored"),
    "Natural, diagonal": functools.partial(_natural, fisher="diagonal"),
}
SUBSPACE_ONLY = ("GaLore", "Natural, history", "Natural, factored")


class Ours:
    """ZeroEngine with one of our optimizers."""

    def __init__(self, name: str, setup: Setup, watch: Callable[[nn.Module], None] | None = None) -> None:
        """`watch` gets the model before anything hooks it."""
        os.environ.setdefault("DS_ACCELERATOR", setup.device)
        check_deepspeed()
        from ngpt.engine.deepspeed_engine import ZeroEngine  # DeepSpeed settles on a device while it is imported

        def build_optimizer(model: nn.Module, sharding: Sharding) -> AdamW:
            if watch is not None:
                watch(model)
            return OURS[name](model, sharding, setup)

        ranks = Collectives()
        config = deepspeed_config({}, zero_stage=setup.stage, micro_batch_size=setup.rows, accumulation_steps=1, world_size=ranks.size)
        self.engine = ZeroEngine(
            functools.partial(build_model, setup),
            build_optimizer,
            config,
            zero_stage=setup.stage,
            device=setup.torch_device,
            dtype=setup.dtype,
            apply=setup.apply,
            grad_clip=0.0,
        )
        self._inputs = tokens_of(setup, ranks.rank)
        self._divisor = setup.rows * setup.seq_len * ranks.size

    def backward(self, micro_batches: int = 1) -> Tensor:
        divisor = self._divisor * micro_batches
        self.engine.begin_update(lr_multiplier=1.0, loss_divisor=divisor, num_micro_batches=micro_batches)
        return torch.stack([self.engine.accumulate(self._inputs) for _ in range(micro_batches)]).sum() / divisor

    def update(self, loss: Tensor) -> float:
        return self.engine.finish_update(loss).loss

    def weight_bytes_sent(self, sent: Mapping[str, int]) -> int:
        return self.engine.communication()["weights"]

    def state_bytes(self) -> StateBytes:
        sharded = whole = replicated = 0
        for part in self.engine.optimizer_parts().values():
            own = part.values.nbytes + (0 if part.scales is None else part.scales.nbytes)
            if part.is_whole:
                replicated += own
            else:
                sharded += own
                whole += part.shape.numel() * part.values.element_size()
        return StateBytes(sharded, whole, replicated)

    def close(self) -> None:
        self.engine.close()


# ------------------------------------------------------------------------------------------------------------------ peer
class DeepSpeedAdamW:
    """deepspeed.initialize with torch's AdamW and DeepSpeed's defaults, except that its buckets are no larger than the model."""

    def __init__(self, setup: Setup) -> None:
        deepspeed = import_deepspeed(setup.device)
        ranks = Collectives()
        model = build_model(setup).to(device=setup.torch_device, dtype=setup.dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        numel = sum(p.numel() for p in trained)
        config = {
            "train_micro_batch_size_per_gpu": setup.rows,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},
            "bf16": {"enabled": setup.dtype == torch.bfloat16},
            "zero_optimization": {"stage": setup.stage, "reduce_bucket_size": numel, "allgather_bucket_size": numel},
        }
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        self.engine.train()
        self._inputs = tokens_of(setup, ranks.rank)
        self._divisor = setup.rows * setup.seq_len  # DeepSpeed takes the mean over ranks

    def backward(self) -> Tensor:
        loss = self.engine(**self._inputs) / self._divisor
        self.engine.backward(loss)
        return loss.detach()

    def update(self, loss: Tensor) -> float:
        self.engine.step()
        return float(loss)

    def weight_bytes_sent(self, sent: Mapping[str, int]) -> int:
        return sent.get("all-gather", 0) if self.engine.zero_optimization_stage() == 3 else 0

    def state_bytes(self) -> StateBytes:
        """Moments, and fp32 copies where DeepSpeed keeps them in the optimizer's state."""
        wrapper = self.engine.optimizer
        state = getattr(wrapper, "optimizer", wrapper).state
        own = sum(value.nbytes for values in state.values() for value in values.values() if isinstance(value, Tensor) and value.ndim)
        sharded = self.engine.zero_optimization_stage() > 0 and Collectives().size > 1
        return StateBytes(own, own * Collectives().size, 0) if sharded else StateBytes(0, 0, own)

    def close(self) -> None:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        self.engine.destroy()
        groups._WORLD_GROUP = None
        comm.cdb = None


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, quiet, in the process group that there is, and without its compiling an operator that only inference needs."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("warning")
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def construct(name: str, setup: Setup) -> Contender:
    """The contender of this name."""
    return DeepSpeedAdamW(setup) if name == PEER else Ours(name, setup)


def discard(contender: Contender, setup: Setup) -> None:
    """Close it and free what it holds."""
    import_deepspeed(setup.device)  # closing another one has made DeepSpeed forget the process group
    contender.close()
    gc.collect()
