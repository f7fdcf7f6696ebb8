"""Which of how many processes this one is: the only reader of the variables that torchrun, deepspeed and srun set."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FIRST_SPECIAL_STEP = 2**32 - 16  # SLURM numbers batch scripts and shells, which are no tasks of an srun, from the top
_FIRST_PORT = 29500


class LaunchError(ValueError):
    """The environment that a launcher sets is incomplete or contradicts itself."""


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


def ranks_from_environment(environment: MutableMapping[str, str] = os.environ) -> Ranks:
    """Read what torchrun, deepspeed or srun has set; a plain `python` is rank 0 of 1.

    What srun says is written to `environment` in torchrun's words too, for torch and DeepSpeed to find.

    Raises:
        LaunchError: some of the variables are set and others, which belong to them, are not; or a value is impossible.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        environment.update(_of_slurm(environment))
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Ranks()
    needed = _REQUIRED if environment.get("WORLD_SIZE") != "1" else _REQUIRED[:2]
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={environment[name]}" for name in _REQUIRED if environment.get(name))
        raise LaunchError(
            f"the environment has {given} but not {', '.join(missing)}; start with torchrun, deepspeed or srun, which set all of them, "
            "or unset them to train on one process"
        )
    rank, world_size, local_rank = (_count(name, environment) for name in _REQUIRED[:3])
    if not rank < world_size:
        raise LaunchError(f"RANK={rank} must be below WORLD_SIZE={world_size}; start all processes with one launcher")
    return Ranks(rank, world_size, local_rank)


def _count(name: str, environment: MutableMapping[str, str]) -> int:
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise LaunchError(f"{name}={text} must be a whole number; launchers set it")
    return int(text)


def _of_slurm(environment: MutableMapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of an srun; nothing for any other process, also of a SLURM job."""
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP:
        return {}
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if tasks == "1":
        return {}
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    missing = [name for name in names.values() if name not in environment] + ([] if hosts else ["SLURM_STEP_NODELIST"])
    if missing:
        raise LaunchError(f"srun has set SLURM_STEP_NUM_TASKS={tasks} but not {', '.join(missing)}; start with srun, torchrun or deepspeed")
    assert hosts is not None
    port = _FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % 1000  # two jobs of one node keep out of each other's way
    return {name: environment[slurm] for name, slurm in names.items()} | {
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts: `gpu[07-09,12],login1` begins with gpu07."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", hosts)
    assert match is not None
    return "".join(part or "" for part in match.groups())
