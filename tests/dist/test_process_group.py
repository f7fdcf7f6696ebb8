"""Ranks come from the launcher's variables; generators are restored exactly."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from ngpt.dist.process_group import Ranks, choose_device, random_state, ranks_from_environment, seed_everything, set_random_state


def test_a_plain_process_is_the_only_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_from_environment() == Ranks(0, 1, 0)
    assert ranks_from_environment().is_main


def test_launchers_variables_are_read(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert ranks_from_environment() == Ranks(3, 4, 1)
    assert not ranks_from_environment().is_main


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out():
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
