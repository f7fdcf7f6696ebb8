"""Who we are comes from the launcher's variables, whichever launcher it is; half of them is an error that names the other half."""

from __future__ import annotations

import pytest

from ngpt.dist.ranks import LaunchError, Ranks, first_host, ranks_from_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29400"}
SRUN = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_a_plain_process_is_the_only_one():
    assert ranks_from_environment({}) == Ranks(0, 1, 0)
    assert ranks_from_environment({}).is_main


def test_launchers_variables_are_read():
    assert ranks_from_environment(dict(TORCHRUN)) == Ranks(3, 4, 1)
    assert not ranks_from_environment(dict(TORCHRUN)).is_main
    assert ranks_from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks(0, 1, 0)


def test_tasks_of_srun_become_ranks_and_later_readers_find_torchruns_words():
    environment = dict(SRUN)
    assert ranks_from_environment(environment) == Ranks(5, 8, 1)
    added = {name: environment[name] for name in environment.keys() - SRUN.keys()}
    assert added == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29623"}
    assert ranks_from_environment(SRUN | TORCHRUN) == Ranks(3, 4, 1)  # torchrun inside srun


@pytest.mark.parametrize(
    "environment",
    [
        {**SRUN, "SLURM_STEP_ID": "4294967291"},  # the batch script itself, which has the variables of the whole job
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["batch script", "no step", "one task"],
)
def test_other_processes_of_a_slurm_job_are_alone(environment):
    assert ranks_from_environment(environment) == Ranks(0, 1, 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "has RANK=1 but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2 but not RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "1"}, "has WORLD_SIZE=1 but not RANK;"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK=x must be a whole number"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}, "but not SLURM_PROCID"),
    ],
)
def test_half_an_environment_is_refused_by_name(environment, message):
    """RANK without WORLD_SIZE and the like | refused, naming what is missing"""
    with pytest.raises(LaunchError, match=message):
        ranks_from_environment(environment)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu07", "gpu07"), ("gpu07,gpu09", "gpu07"), ("gpu[07-09,12],login1", "gpu07"), ("n[3,5]-ib,m1", "n3-ib")],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert first_host(hosts) == first
