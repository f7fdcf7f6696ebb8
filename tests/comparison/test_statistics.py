"""The interval of a paired difference, held against the density of Student's t integrated by other means, and printed tables."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from ngpt.comparison.statistics import paired_difference, t_quantile


def probability_within(t: float, degrees: int) -> float:
    """P(|T| < t) by Simpson's rule over the density."""
    x = np.linspace(0, t, 20_001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return 2 * float((weights * density).sum()) * (x[1] - x[0]) / 3


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 7, 10, 19, 30, 101])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_quantile_encloses_the_probability_that_it_is_of(degrees: int, confidence: float) -> None:
    assert probability_within(t_quantile(confidence, degrees), degrees) == pytest.approx(confidence, abs=1e-7)


@pytest.mark.parametrize(("degrees", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (1000, 1.962)])
def test_the_quantile_is_that_of_printed_tables(degrees: int, printed: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(printed, abs=5e-4)


def test_what_two_runs_of_a_seed_share_falls_out_of_their_difference() -> None:
    a = {0: 3.0, 1: 4.0, 2: 5.0, 7: 9.0}
    b = {2: 4.95, 1: 3.98, 0: 2.97, 8: 1.0}  # another order, and one seed that the other has not
    found = paired_difference(a, b)
    assert found is not None
    differences = [-0.03, -0.02, -0.05]
    assert found.pairs == 3
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert found.standard_error == pytest.approx(np.std(differences, ddof=1) / 3**0.5)
    assert found.half_width == pytest.approx(4.30265 * found.standard_error, rel=1e-5)
    assert not found.is_told  # 0.033 +- 0.038


def test_the_interval_of_small_samples_holds_the_truth_as_often_as_it_says() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(4000):
        first = {seed: generator.gauss(3, 1) for seed in range(3)}
        second = {seed: loss + generator.gauss(0.1, 0.02) for seed, loss in first.items()}
        found = paired_difference(first, second)
        assert found is not None
        held += abs(found.mean - 0.1) <= found.half_width
    assert held / 4000 == pytest.approx(0.95, abs=0.01)


def test_one_pair_tells_nothing_of_the_spread_and_none_nothing_at_all() -> None:
    alone = paired_difference({0: 3.0}, {0: 2.5})
    assert alone is not None
    assert (alone.mean, alone.pairs, alone.is_told) == (-0.5, 1, False)
    assert math.isnan(alone.standard_error)
    assert math.isnan(alone.half_width)
    assert paired_difference({0: 3.0}, {1: 2.5}) is None


def test_runs_that_are_equal_to_the_last_bit_are_not_told_apart() -> None:
    same = paired_difference({0: 3.0, 1: 4.0}, {0: 3.0, 1: 4.0})
    assert same is not None
    assert (same.mean, same.half_width, same.is_told) == (0.0, 0.0, False)
