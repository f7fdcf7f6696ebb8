"""The engine for any number of ranks: DeepSpeed runs, partitions and gathers the model; updates are ours. The only DeepSpeed import.

`ngpt.engine.deepspeed_contract` lists what this relies on; call its `check_deepspeed` before the first import of this module.
"""

# DeepSpeed puts attributes on parameters and modules, and has few annotations.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload, partition_parameters
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils import groups
from deepspeed.utils.logging import set_log_level_from_string
from torch import Tensor, nn

from ngpt.dist.collectives import Collectives
from ngpt.engine.deepspeed_config import speaks
from ngpt.engine.update_cycle import UpdateCycle
from ngpt.engine.zero_sharding import ShardedUpdates, ZeroSharding
from ngpt.optim import AdamW
from ngpt.optim.watch import Watch


class ZeroEngine(UpdateCycle):
    """One model and one optimizer over all ranks of the default process group, which must have been started.

    Args:
        build_model: makes the model, in fp32 on the CPU, from the seed alone; at stage 3 DeepSpeed takes each weight as it is drawn.
        build_optimizer: makes the optimizer of the model's parameters, given which part of them this rank has.
        config: of DeepSpeed, from `ngpt.engine.deepspeed_config`.
        zero_stage: 0: nothing is divided among ranks; 1: optimizer state; 2: accumulated gradients too; 3: weights too.
        dtype: of weights and activations.
        apply: `whole`, `deferred` or `immediate`, as `optimizer.apply`. Here `whole` is `deferred`: no rank needs whole gradients.
        grad_clip: largest global gradient norm; 0 for none.
        communication_dtype: of gradients between ranks (None: that of the weights).
        offload_optimizer: moments, history and master copies are in the CPU's memory and updated there.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        build_optimizer: Callable[[nn.Module, ZeroSharding], AdamW],
        config: Mapping[str, Any],
        *,
        zero_stage: int,
        device: torch.device,
        dtype: torch.dtype,
        apply: str,
        grad_clip: float,
        communication_dtype: torch.dtype | None = None,
        offload_optimizer: bool = False,
    ) -> None:
        _start_deepspeed(device)
        self._ranks = Collectives()
        self._gathers = _Gathers(self._ranks.size)
        self._counted = {"updates": 0, "weights": 0}
        if zero_stage == 3:
            model = self._build_partitioned(build_model, config, device, dtype)
        else:
            model = build_model().to(device=device, dtype=dtype)
        weights = _PartitionedWeights(self._ranks) if zero_stage == 3 else None
        self._sharding = ZeroSharding(self._ranks, stage=zero_stage, weights=weights, offload=offload_optimizer)
        optimizer = build_optimizer(model, self._sharding)
        mode = "deferred" if apply == "whole" else apply
        updates = ShardedUpdates(optimizer, model.parameters(), self._ranks, apply=mode, communication_dtype=communication_dtype)
        self._engine = _Engine(model, optimizer, updates, dict(config))
        gradients = _DeepSpeedGradients(self._engine, updates)
        super().__init__(model, optimizer, gradients, forward=self._engine, device=device, grad_clip=grad_clip)
        if speaks(config):
            set_log_level_from_string(config.get("log_level", "info"))

    def _build_partitioned(
        self, build_model: Callable[[], nn.Module], config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        with _Partitioning(dict(config), dtype, self._gathers):
            model = build_model()
        for buffer in model.buffers():  # as `to(device, dtype)` does below stage 3
            buffer.data = buffer.data.to(device=device, dtype=dtype if buffer.is_floating_point() else buffer.dtype)
        return model

    # ------------------------------------------------------------------------------------------------- weights and state
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach() if self._sharding.keeps_weights_whole else self._gather_on_first(parameter)

    def _gather_on_first(self, parameter: Tensor) -> Tensor:
        """The whole weight on rank 0, from the ranks' slices; on others an empty tensor."""
        size, shape = self._ranks.size, self._sharding.shape(parameter)
        own = self._sharding.flat(parameter).to(self.device)
        share, is_first = -(-shape.numel() // size), self._ranks.rank == 0
        lengths = [max(min(share, shape.numel() - rank * share), 0) if is_first else 0 for rank in range(size)]
        parts = self._ranks.exchange([own, *[own[:0]] * (size - 1)], lengths)
        return torch.cat(parts).view(shape) if is_first else own[:0]

    def load_weights(
        self, read: Callable[[str], Tensor], names: Sequence[str], *, may_miss: Callable[[str], bool] = lambda name: False
    ) -> None:
        with self._engine.optimizer.partitioned():
            super().load_weights(read, names, may_miss=may_miss)

    def _shape(self, parameter: Tensor) -> torch.Size:
        return self._sharding.shape(parameter)

    def _write_weight(self, parameter: Tensor, whole: Tensor) -> None:
        if self._sharding.keeps_weights_whole:
            parameter.copy_(whole)
        else:
            self._sharding.flat(parameter).copy_(whole.reshape(-1)[slice(*self._sharding.span(whole.numel()))])

    def _weight_bytes(self, parameter: Tensor) -> int:
        """Of what is kept between updates: at stage 3 the slice, and a copy of the whole where DeepSpeed keeps a small one."""
        if self._sharding.keeps_weights_whole:
            return parameter.nbytes
        kept: Any = parameter
        return (kept.ds_tensor.numel() + (kept.ds_numel if kept.ds_persist else 0)) * kept.element_size()

    def _end_watch(self, watch: Watch) -> dict[str, dict[str, float]]:
        # Where nothing is divided, all ranks hold the same: it counts once.
        return watch.end(self._ranks.sum_, counts=self._sharding.parts > 1 or self._ranks.rank == 0)

    def communication(self) -> dict[str, int]:
        so_far = {"updates": self._ranks.bytes_sent, "weights": self._gathers.bytes_sent}
        since = {kind: count - self._counted[kind] for kind, count in so_far.items()}
        self._counted = so_far
        return since

    def close(self) -> None:
        super().close()
        self._engine.close()


# ---------------------------------------------------------------------------------------------------- divided weights
class _PartitionedWeights:
    """Stage 3: DeepSpeed has cut every flattened weight into equal slices, the last ones padded; `ds_tensor` is this rank's."""

    def __init__(self, ranks: Collectives) -> None:
        self._rank = ranks.rank

    def shape(self, p: Any) -> torch.Size:
        return p.ds_shape

    def flat(self, p: Any) -> Tensor:
        share = p.ds_tensor.numel()
        return p.ds_tensor.detach()[: max(min(p.ds_numel - self._rank * share, share), 0)]


class _Gathers:
    """Counts the bytes that this rank sends when DeepSpeed gathers weights: its slice to each of the others."""

    def __init__(self, size: int) -> None:
        self._others = size - 1
        self.bytes_sent = 0

    def counted(self, gather: Callable[..., Any], parameter: Tensor) -> Callable[..., Any]:
        """`gather(parameters)`, or of `parameter` alone where none are given, with a count."""

        def counting(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
            gathered = [parameter] if param_list is None else list(param_list)
            self.bytes_sent += self._others * sum(p.ds_tensor.nbytes for p in gathered if p.ds_status is _NOT_AVAILABLE)
            return gather(gathered, *args, **kwargs)

        return counting


_NOT_AVAILABLE = partition_parameters.ZeroParamStatus.NOT_AVAILABLE


class _Partitioning(partition_parameters.Init):
    """DeepSpeed's context for building a model that never exists whole: weights are drawn in fp32, as on one process, and then cast."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, gathers: _Gathers) -> None:
        super().__init__(config_dict_or_path=config)
        # Ranks compare these numbers, which count on over all engines of a process; its peers may have had fewer of them.
        partition_parameters.Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0  # pyright: ignore[reportOptionalSubscript]
        self._weight_dtype = dtype
        self._gathers = gathers

    # DeepSpeed would make torch.empty and its like ignore the dtype they are given, while the model is built.
    def _add_tensor_creation_wrappers(self) -> None: ...

    def _remove_tensor_creation_wrappers(self) -> None: ...

    def _zero_init_param(self, param: Tensor) -> None:
        param.data = param.data.to(self._weight_dtype)
        super()._zero_init_param(param)
        for name in ("all_gather", "all_gather_coalesced"):
            setattr(param, name, self._gathers.counted(getattr(param, name), param))


# ------------------------------------------------------------------------------------------------- the seam to DeepSpeed
class _Engine(DeepSpeedEngine):
    """DeepSpeed's engine around our updates."""

    def __init__(self, model: nn.Module, optimizer: AdamW, updates: ShardedUpdates, config: dict[str, Any]) -> None:
        self.__dict__["_updates"] = updates  # the base class asks for its optimizer before it lets attributes be set
        super().__init__(
            args=None, model=model, optimizer=optimizer, config=config, config_class=DeepSpeedConfig(config), dont_change_device=True
        )

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        return ZERO_OPTIMIZATION  # at every stage and dtype: some combinations would silently get an optimizer of DeepSpeed's own

    def _configure_zero_optimizer(self, optimizer: AdamW) -> _Optimizer:
        return _Optimizer(self, optimizer, self.__dict__["_updates"])

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Does nothing: gradients were summed, as much as they need to be, in the hooks. (Stage 0 would make new ones, all zero.)"""

    def close(self) -> None:
        """Remove all hooks, and what DeepSpeed leaves behind in the process."""
        self.module_forward_pre_hook.remove()
        self.module_forward_post_hook.remove()
        self.destroy()
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self.module]
        partition_parameters.shutdown_init_context()
        patched = partition_parameters.InsertPostInitMethodToModuleSubClasses
        if hasattr(patched, "linear_bk"):
            nn.functional.linear = patched.linear_bk
        groups._WORLD_GROUP = None
        deepspeed_comm.cdb = None  # else an engine in another process group would go on with this one's


class _Optimizer(ZeROOptimizer):
    """What DeepSpeed takes for its ZeRO optimizer. At stage 3 it also owns the partitioning of the weights."""

    def __init__(self, engine: DeepSpeedEngine, optimizer: AdamW, updates: ShardedUpdates) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.overflow = False  # whether the next step drops the update
        self.dp_process_group = engine.seq_data_parallel_group
        self._global_grad_norm: float | None = None
        self.custom_loss_scaler, self.torch_autocast_gradscaler = False, None
        self.dynamic_loss_scale, self.loss_scaler, self.loss_scale = False, None, 1.0
        self._updates = updates
        self._offload = _offload(engine) if engine.zero_optimization_stage() == 3 else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    # Called by the engine after each backward: by then gradients have been dealt with.
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None: ...

    def overlapping_partition_gradients_reduce_epilogue(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def backward_epilogue(self, **_options: Any) -> None:
        if self._offload is not None:
            self._offload.release_backward_leftovers()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        with self.partitioned():
            if self.overflow:
                self._updates.discard()
            else:
                self._updates.step()

    @contextlib.contextmanager
    def partitioned(self) -> Iterator[None]:
        """While slices of weights are written, no gathered copy may stay alive: it would be taken for the new weight."""
        if self._offload is None:
            yield
            return
        self._offload.partition_all_parameters()
        yield
        if get_accelerator().device_name() == "cuda":  # the next gathers run in a stream of their own
            self._offload._DeepSpeedZeRoOffload__allgather_stream.wait_stream(torch.cuda.current_stream())
        if self._offload.persistent_parameters:
            self._offload.persistent_parameters[0].all_gather(self._offload.persistent_parameters)

    def empty_partition_cache(self) -> None:
        if self._offload is not None:
            self._offload.empty_partition_cache()

    def destroy(self) -> None:
        if self._offload is not None:
            self._offload.destroy()


def _offload(engine: DeepSpeedEngine) -> DeepSpeedZeRoOffload:
    """Partitioning and gathering with all of the user's options: left to itself it takes defaults that keep every weight gathered."""
    return DeepSpeedZeRoOffload(
        engine.module,
        timers=engine.timers,
        ds_config=engine.config,
        overlap_comm=engine.zero_overlap_comm(),
        prefetch_bucket_size=1 if engine.zero_allgather_sequential() else engine.zero_prefetch_bucket_size(),
        max_reuse_distance=engine.zero_max_reuse_distance(),
        max_live_parameters=engine.zero_max_live_parameters(),
        param_persistence_threshold=engine.zero_param_persistence_threshold(),
        model_persistence_threshold=engine.zero_model_persistence_threshold(),
        offload_param_config=engine.zero_offload_param(),
        zero_module_granularity_threshold=engine.zero_module_granularity_threshold(),
        log_trace_cache_warnings=engine.zero_log_trace_cache_warnings(),
    )


class _DeepSpeedGradients:
    """Backward and step by way of DeepSpeed's engine."""

    def __init__(self, engine: _Engine, updates: ShardedUpdates) -> None:
        self.immediate = updates.immediate
        self._engine, self._updates = engine, updates
        self._micro_batches_left = 1

    def begin_update(self, num_micro_batches: int) -> None:
        self._updates.begin_update(num_micro_batches)
        self._set_left(num_micro_batches)

    def backward(self, loss: Tensor) -> None:
        self._updates.begin_micro_batch()
        # An immediate update cannot be taken back, so a loss that is not finite on any rank must not reach backward on one.
        if not self.immediate or self._updates.all_finite(loss.detach()):
            self._engine.backward(loss, scale_wrt_gas=False)
        self._updates.end_micro_batch()
        self._set_left(self._micro_batches_left - 1)

    def _set_left(self, micro_batches: int) -> None:
        """DeepSpeed wants to know before forward whether the micro-batch is the last one of the update."""
        self._micro_batches_left = micro_batches
        self._engine.set_gradient_accumulation_boundary(micro_batches <= 1)

    def live_bytes(self) -> int:
        return self._updates.live_bytes()

    def scalars(self, loss: Tensor) -> Tensor:
        return self._updates.scalars(loss)

    def scale_(self, factor: float) -> None:
        self._updates.scale_(factor)

    def step(self) -> None:
        self._engine.optimizer.overflow = False
        self._engine.step()

    def discard(self) -> None:
        self._engine.optimizer.overflow = True
        self._engine.step()

    def close(self) -> None:
        self._updates.detach()


# -------------------------------------------------------------------------------------------------------------- start-up
def _start_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed find the process group that there is, quietly, and without its compiling anything."""
    if get_accelerator().device_name() != device.type:
        raise RuntimeError(
            f"DeepSpeed computes on {get_accelerator().device_name()}, the trainer on {device.type}: "
            f"set the environment variable DS_ACCELERATOR={device.type}"
        )
    set_log_level_from_string("warning")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)  # its calls, not ours
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # This operator serves inference; DeepSpeed would compile it for minutes, or wait for ever on the lock of a build that was killed.
    # (To ask for the table itself would try out the C compiler on all operators, aloud.)
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
