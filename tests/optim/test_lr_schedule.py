"""Schedules: where they start, peak and end."""

from __future__ import annotations

import functools

import pytest

from ngpt.optim.lr_schedule import constant, cosine, linear, wsd

SCHEDULES = {
    "cosine": functools.partial(cosine, total_steps=100, min_lr_ratio=0.1),
    "linear": functools.partial(linear, total_steps=100, min_lr_ratio=0.1),
    "wsd": functools.partial(wsd, total_steps=100, min_lr_ratio=0.1),
    "constant": constant,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_starts_above_zero_and_ends_at_the_peak(name: str) -> None:
    factors = [SCHEDULES[name](step, warmup_steps=10) for step in range(11)]
    assert factors == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_the_first_update_has_the_peak_rate(name: str) -> None:
    assert SCHEDULES[name](0, warmup_steps=0) == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_floor_is_reached_and_kept(name: str) -> None:
    factors = [SCHEDULES[name](step, warmup_steps=10) for step in range(10, 150)]
    assert factors == sorted(factors, reverse=True)
    assert factors[89] == pytest.approx(0.1, abs=0.05)
    assert factors[90:] == pytest.approx([0.1] * 50)


def test_cosine_and_linear_are_half_way_in_the_middle() -> None:
    for schedule in (cosine, linear):
        assert schedule(55, total_steps=100, warmup_steps=10, min_lr_ratio=0.1) == pytest.approx(0.55)


def test_wsd_is_stable_until_its_decay() -> None:
    factors = [wsd(step, total_steps=100, warmup_steps=10, decay_fraction=0.2) for step in range(100)]
    assert set(factors[9:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5)


def test_a_run_that_is_all_warm_up_does_not_divide_by_zero() -> None:
    for schedule in (cosine, linear, wsd):
        assert schedule(9, total_steps=10, warmup_steps=10) == 1.0
        assert schedule(10, total_steps=10, warmup_steps=10) == 0.0
