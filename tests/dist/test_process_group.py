"""A group begins only where it is needed; generators are restored exactly."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ngpt.dist.process_group import choose_device, process_group, random_state, seed_everything, set_random_state
from ngpt.dist.ranks import Ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out():
    """trainer.device=cuda where there is no GPU | refused, with what to do"""
    assert choose_device("auto", Ranks()) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"trainer\.device = cuda.*trainer\.device=auto"):
        choose_device("cuda", Ranks())


def test_generators_continue_where_they_were_through_a_file(tmp_path):
    seed_everything(5)
    torch.rand(3)
    random.random()
    random.gauss()  # keeps a second number for the next call
    save_file(random_state(), tmp_path / "random.safetensors")
    expected = (torch.rand(4), random.gauss(), random.random())
    seed_everything(6)
    set_random_state(load_file(tmp_path / "random.safetensors"))
    assert torch.equal(torch.rand(4), expected[0])
    assert (random.gauss(), random.random()) == expected[1:]


def test_a_process_alone_has_a_group_only_where_it_is_needed():
    with process_group(Ranks(), torch.device("cpu"), timeout_seconds=5) as collectives:
        assert collectives.size == 1
        assert not dist.is_initialized()
    with process_group(Ranks(), torch.device("cpu"), timeout_seconds=5, needed=True) as collectives:
        assert collectives.size == 1
        assert dist.is_initialized()
    assert not dist.is_initialized()
