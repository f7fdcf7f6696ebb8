"""Every name of DeepSpeed that this project relies on, most of them private, and the check at start-up that none has moved."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

TESTED = "0.19.3 to 0.19.8"
OLDEST, BELOW = (0, 19, 3), (0, 20)


class Name(NamedTuple):
    """A name of DeepSpeed: `path` in `module`, with the parameters that it must take, or what it must mention by name."""

    module: str
    path: str
    parameters: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()


_ENGINE, _OPTIMIZER = "deepspeed.runtime.engine", "deepspeed.runtime.base_optimizer"
_OFFLOAD, _PARTITION = "deepspeed.runtime.zero.parameter_offload", "deepspeed.runtime.zero.partition_parameters"

CONTRACT = (
    # Overridden in the engine, or called.
    Name(
        _ENGINE,
        "DeepSpeedEngine.__init__",
        ("args", "model", "optimizer", "config", "config_class", "dont_change_device"),
        ("_configure_distributed_model", "_configure_optimizer", "_set_distributed_vars"),
    ),
    Name(_ENGINE, "DeepSpeedEngine._configure_optimizer", (), ("_do_optimizer_sanity_check", "_configure_zero_optimizer")),
    Name(_ENGINE, "DeepSpeedEngine._configure_zero_optimizer", ("optimizer",)),
    Name(_ENGINE, "DeepSpeedEngine._do_optimizer_sanity_check", ("basic_optimizer",)),
    Name(_ENGINE, "DeepSpeedEngine.allreduce_gradients", ("bucket_size",)),
    Name(_ENGINE, "DeepSpeedEngine.backward", ("loss", "scale_wrt_gas"), ("_backward_epilogue",)),
    Name(_ENGINE, "DeepSpeedEngine._backward_epilogue", (), ("allreduce_gradients", "backward_epilogue", "exit_backward")),
    Name(_ENGINE, "DeepSpeedEngine.step", (), ("is_gradient_accumulation_boundary", "_take_model_step")),
    Name(_ENGINE, "DeepSpeedEngine._take_model_step", (), ("step", "_global_grad_norm", "zero_grad", "overflow", "lr_scheduler")),
    Name(_ENGINE, "DeepSpeedEngine.set_gradient_accumulation_boundary", ("is_boundary",)),
    Name(_ENGINE, "DeepSpeedEngine.destroy", (), ("destroy",)),
    Name(_ENGINE, "ZERO_OPTIMIZATION"),
    *(
        Name(_ENGINE, f"DeepSpeedEngine.{getter}")
        for getter in (
            "zero_overlap_comm",
            "zero_prefetch_bucket_size",
            "zero_max_reuse_distance",
            "zero_max_live_parameters",
            "zero_param_persistence_threshold",
            "zero_model_persistence_threshold",
            "zero_offload_param",
            "zero_module_granularity_threshold",
            "zero_log_trace_cache_warnings",
            "zero_allgather_sequential",
            "wall_clock_breakdown",
        )
    ),
    # The optimizer's base: what it brings along, and what it reads of us.
    Name(_OPTIMIZER, "ZeROOptimizer.__init__"),
    *(
        Name(_OPTIMIZER, f"ZeROOptimizer.{method}")
        for method in (
            "clear_backward_seen_flag",
            "backward_prologue",
            "backward_epilogue",
            "enter_backward",
            "exit_backward",
            "queue_post_backward_callback",
            "register_grad_acc_post_hook",
        )
    ),
    Name(_OPTIMIZER, "ZeROOptimizer.scale_if_loss", ("value",)),
    Name(_OPTIMIZER, "ZeROOptimizer.needs_scaler"),
    # Stage 3: partitioning, gathering, and the state that they leave behind in the process.
    Name(
        _OFFLOAD,
        "DeepSpeedZeRoOffload.__init__",
        (
            "module",
            "timers",
            "ds_config",
            "overlap_comm",
            "prefetch_bucket_size",
            "max_reuse_distance",
            "max_live_parameters",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "offload_param_config",
            "zero_module_granularity_threshold",
            "log_trace_cache_warnings",
        ),
        ("persistent_parameters", "_DeepSpeedZeRoOffload__allgather_stream"),
    ),
    Name(_OFFLOAD, "DeepSpeedZeRoOffload.partition_all_parameters"),
    Name(_OFFLOAD, "DeepSpeedZeRoOffload.release_backward_leftovers"),
    Name(_OFFLOAD, "DeepSpeedZeRoOffload.empty_partition_cache"),
    Name(_OFFLOAD, "DeepSpeedZeRoOffload.destroy"),
    Name(_OFFLOAD, "DeepSpeedZeRoOffload._register_deepspeed_module", ("count",)),
    Name(_OFFLOAD, "FWD_MODULE_STACK"),
    Name(_PARTITION, "Init.param_id"),
    Name(_PARTITION, "Init.__init__", ("config_dict_or_path", "enabled")),
    Name(_PARTITION, "Init._zero_init_param", ("param",)),
    Name(_PARTITION, "Init._post_init_method", ("module",), ("_zero_init_param",)),
    Name(_PARTITION, "Init._add_tensor_creation_wrappers"),
    Name(_PARTITION, "Init._remove_tensor_creation_wrappers"),
    Name(
        _PARTITION,
        "Init._convert_to_deepspeed_param",
        ("param",),
        ("ds_shape", "ds_numel", "ds_tensor", "ds_status", "all_gather", "all_gather_coalesced"),
    ),
    Name(_PARTITION, "InsertPostInitMethodToModuleSubClasses.__exit__"),
    # What surrounds the engine.
    Name("deepspeed.runtime.config", "DeepSpeedConfig.__init__", ("config",)),
    Name("deepspeed.comm.comm", "init_distributed", ("dist_backend", "auto_mpi_discovery", "verbose")),
    Name("deepspeed.accelerator", "get_accelerator"),
    Name("deepspeed.utils.logging", "set_log_level_from_string", ("log_level_str",)),
    Name("deepspeed.comm.torch", "build_shm_op", (), ("__compatible_ops__",)),
)


class UnknownDeepSpeed(RuntimeError):
    """The installed DeepSpeed is not one that this project knows how to drive."""


def check_deepspeed(load: Callable[[str], ModuleType] = importlib.import_module) -> None:
    """Raise UnknownDeepSpeed, with all that has moved, unless the installed DeepSpeed is of a known version and has every name."""
    try:
        version: str = load("deepspeed").__version__
    except ImportError as error:
        raise UnknownDeepSpeed(f"DeepSpeed cannot be imported ({error}); {_install()}") from error
    moved = [line for name in CONTRACT if (line := _moved(name, load)) is not None]
    known = OLDEST <= tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit()) < BELOW
    if moved or not known:
        what = [f"DeepSpeed {version} is not one that ngpt was tested with ({TESTED}); {_install()}", *moved]
        raise UnknownDeepSpeed("\n  ".join(what))


def _install() -> str:
    older, newer = (".".join(map(str, version)) for version in (OLDEST, BELOW))
    return f"pip install 'deepspeed>={older},<{newer}'"


def _moved(name: Name, load: Callable[[str], ModuleType]) -> str | None:
    """What is wrong with a name, or None."""
    where = f"{name.module}.{name.path}"
    try:
        found: Any = load(name.module)
        for part in name.path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return f"{where}: gone"
    if name.parameters:
        accepted = inspect.signature(_undecorated(found)).parameters
        lost = [parameter for parameter in name.parameters if parameter not in accepted]
        if lost:
            return f"{where}: takes no {', '.join(lost)} any more"
    if not name.mentions:
        return None
    used = _names_in(_undecorated(found).__code__)
    unused = [mention for mention in name.mentions if mention not in used]
    return f"{where}: uses no {', '.join(unused)} any more" if unused else None


def _undecorated(function: Any) -> Any:
    """The function itself, below DeepSpeed's decorator for profiles, which leaves no trace of it but its closure."""
    below = [cell.cell_contents for cell in function.__closure__ or () if inspect.isfunction(cell.cell_contents)]
    return below[0] if function.__name__ == "wrapped_fn" and below else inspect.unwrap(function)


def _names_in(code: Any) -> set[str]:
    """Names of attributes and globals in a function, functions inside it included, and the strings that it hands to getattr."""
    inner = [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return set(code.co_names) | strings | set(code.co_varnames) | set(code.co_cellvars) | {n for c in inner for n in _names_in(c)}
