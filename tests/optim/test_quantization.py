"""8-bit moments: errors within their bounds, unbiased rounding, exact repetition, and training that does not notice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngpt.optim.quantization import BLOCK, code_shapes, dequantize, quantize_

BOTH_MAPS = pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
BOTH_ROUNDINGS = pytest.mark.parametrize("seed", [None, 0], ids=["nearest", "stochastic"])
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def store(values: Tensor, *, signed: bool, seed: int | None = None) -> tuple[Tensor, Tensor]:
    num_codes, num_scales = code_shapes(values.numel())
    codes, scales = torch.full((num_codes,), 99, dtype=torch.uint8), torch.full((num_scales,), 99.0)
    quantize_(codes, scales, values, signed=signed, generator=generator(seed))
    return codes, scales


def store_and_read(values: Tensor, *, signed: bool, seed: int | None = None) -> Tensor:
    return dequantize(*store(values, signed=signed, seed=seed), signed=signed)


def spread_values(exponent: float, spread: float, seed: int, *, signed: bool, numel: int = 2 * BLOCK + 37) -> Tensor:
    """Magnitudes log-uniform over `spread` decades below 10^exponent; zeros among them."""
    source = torch.Generator().manual_seed(seed)
    decades = exponent - spread * torch.rand(numel, generator=source, dtype=torch.float64)
    values = (10.0**decades).float()
    values[torch.rand(numel, generator=source) < 0.05] = 0
    if signed:
        values *= torch.randint(0, 2, (numel,), generator=source) * 2 - 1
    return values


def largest_of_block(values: Tensor) -> Tensor:
    return torch.cat([block.abs().amax().expand(block.numel()) for block in values.split(BLOCK)])


def test_one_code_a_value_and_one_scale_a_block() -> None:
    assert [code_shapes(n) for n in (0, 1, 255, 256, 257, 1000)] == [(0, 0), (1, 1), (255, 1), (256, 1), (257, 2), (1000, 4)]


# -------------------------------------------------------------------------------------------------------------------- errors
@settings(deadline=None)
@given(st.floats(-38, 30), st.floats(0, 14), st.integers(0, 1000), st.sampled_from([None, 0]))
def test_unsigned_relative_error_is_bounded_at_every_magnitude(exponent: float, spread: float, seed: int, rounding: int | None) -> None:
    values = spread_values(exponent, spread, seed, signed=False)
    read = store_and_read(values, signed=False, seed=rounding)
    floor = (6e-10 * largest_of_block(values)).clamp(min=1.2 * SMALLEST_NORMAL)
    bound = 1 / 17 if rounding is None else 1 / 8
    inside = values >= floor
    assert ((read - values).abs()[inside] <= bound * values[inside] * (1 + 1e-6)).all()
    assert (read[values == 0] == 0).all()
    below = (values > 0) & ~inside
    assert (read[below] > 0).all()
    assert (read[below] <= 1.2 * floor[below]).all()


@settings(deadline=None)
@given(st.floats(-38, 30), st.floats(0, 14), st.integers(0, 1000), st.sampled_from([None, 0]))
def test_signed_error_is_at_most_the_gap_between_fourth_powers(exponent: float, spread: float, seed: int, rounding: int | None) -> None:
    values = spread_values(exponent, spread, seed, signed=True)
    read = store_and_read(values, signed=True, seed=rounding).double()
    largest = largest_of_block(values).double().clamp(min=1e-300)
    root = 127 * (values.double().abs() / largest) ** 0.25
    reach = 0.5 if rounding is None else 1.0
    bound = largest * (((root + reach) / 127) ** 4 - (root / 127) ** 4)
    flushed = largest < SMALLEST_NORMAL  # by definition: such a block is zero
    assert ((read - values).abs()[~flushed] <= bound[~flushed] * (1 + 1e-4) + 1e-44).all()
    assert (read[flushed] == 0).all()
    assert (read * values >= 0).all()


@BOTH_MAPS
@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-38, 1e30, 3.4e38])
def test_the_ends_of_fp32_stay_finite(signed: bool, largest: float) -> None:
    values = torch.full((BLOCK,), largest)
    values[::2] = torch.tensor(1e-45)
    for seed in (None, 0):
        read = store_and_read(values, signed=signed, seed=seed)
        assert read.isfinite().all()
        if not signed:
            assert (read > 0).all()
    if largest > 1e-38:
        assert read[1] == pytest.approx(largest, rel=1 / 15)


@BOTH_MAPS
def test_larger_values_are_never_read_as_smaller_ones(signed: bool) -> None:
    values = spread_values(0, 12, 3, signed=signed, numel=BLOCK).sort().values
    assert (store_and_read(values, signed=signed).diff() >= 0).all()


# ------------------------------------------------------------------------------------------------------------------ rounding
@BOTH_MAPS
def test_stochastic_rounding_is_right_on_average(signed: bool) -> None:
    values = spread_values(0, 8, 5, signed=signed, numel=BLOCK)
    reads = torch.stack([store_and_read(values, signed=signed, seed=s) for s in range(4000)]).double()
    deviation = reads.mean(0) - values
    standard_error = reads.std(0) / math.sqrt(len(reads))
    assert (deviation.abs() <= 5 * standard_error + 1e-5 * values.abs()).all()
    assert float((deviation / standard_error.clamp(min=1e-30))[standard_error > 0].square().mean()) == pytest.approx(1, abs=0.4)
    assert ((reads != reads[0]).any(0).sum()) > 0.8 * BLOCK
    assert all(len(column.unique()) <= 2 for column in reads.T)  # the two neighbours only


def test_a_maximum_just_below_a_power_of_two_is_not_cut_off() -> None:
    values = torch.full((40 * BLOCK,), 1.99)
    assert (store_and_read(values, signed=False) == 2).all()
    read = store_and_read(values, signed=False, seed=0)
    assert set(read.tolist()) == {1.875, 2.0}
    assert float(read.mean()) == pytest.approx(1.99, abs=0.003)


@BOTH_MAPS
def test_nearest_rounding_goes_to_the_nearest_level(signed: bool) -> None:
    values = spread_values(0, 6, 7, signed=signed, numel=BLOCK)
    codes, scales = store(values, signed=signed)
    levels = dequantize(torch.arange(256, dtype=torch.uint8), scales, signed=signed)
    power = 0.25 if signed else 1.0  # signed levels are nearest in the fourth root, where they are equally far apart

    def place(x: Tensor) -> Tensor:
        return x.abs() ** power * x.sign()

    distances = (place(levels) - place(values)[:, None]).abs()
    own = distances.gather(1, codes.long()[:, None])[:, 0]
    assert (own <= distances.min(1).values + 1e-6 * place(values).abs()).all()


@BOTH_MAPS
def test_a_generator_repeats_itself(signed: bool) -> None:
    values = spread_values(0, 3, 1, signed=signed)
    first, again, other = (store(values, signed=signed, seed=s)[0] for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@BOTH_MAPS
@pytest.mark.parametrize("spread", [2, 9])
def test_quantising_what_was_read_gives_the_same_codes(signed: bool, spread: float) -> None:
    codes, scales = store(spread_values(-3, spread, 2, signed=signed), signed=signed)
    again, again_scales = store(dequantize(codes, scales, signed=signed), signed=signed)
    assert torch.equal(codes, again)
    torch.testing.assert_close(scales, again_scales, rtol=0 if not signed else 1e-6, atol=0)


def test_stochastic_rounding_of_unsigned_levels_changes_no_value() -> None:
    read = store_and_read(spread_values(-3, 6, 2, signed=False), signed=False, seed=1)
    for seed in range(20):
        assert torch.equal(store_and_read(read, signed=False, seed=seed), read)


# ------------------------------------------------------------------------------------------------------------- special blocks
@BOTH_MAPS
@BOTH_ROUNDINGS
def test_a_partial_block_is_quantised_like_a_block_of_its_own(signed: bool, seed: int | None) -> None:
    values = spread_values(0, 3, 9, signed=signed, numel=2 * BLOCK + 37)
    values[-37:] *= 1e-6
    codes, scales = store(values, signed=signed, seed=seed)
    read = dequantize(codes, scales, signed=signed)
    assert ((read - values).abs() <= 0.15 * values.abs() + 2e-8 * largest_of_block(values)).all()
    if seed is None:
        tail_codes, tail_scales = store(values[-37:], signed=signed)
        assert torch.equal(codes[-37:], tail_codes)
        assert torch.equal(scales[-1:], tail_scales)
    assert store(values[:0], signed=signed)[0].numel() == 0


@BOTH_MAPS
@BOTH_ROUNDINGS
def test_zeros_have_scale_zero_and_stay_zeros(signed: bool, seed: int | None) -> None:
    codes, scales = store(torch.zeros(300), signed=signed, seed=seed)
    assert not codes.any()
    assert not scales.any()
    assert torch.equal(dequantize(codes, scales, signed=signed), torch.zeros(300))
    fresh = dequantize(torch.zeros(300, dtype=torch.uint8), torch.zeros(2), signed=signed)  # state as it is allocated
    assert torch.equal(fresh, torch.zeros(300))


@BOTH_ROUNDINGS
@pytest.mark.parametrize(("signed", "bad"), [(False, math.nan), (False, math.inf), (True, math.nan), (True, math.inf), (True, -math.inf)])
def test_a_value_that_is_not_finite_shows_in_its_whole_block_and_no_other(signed: bool, seed: int | None, bad: float) -> None:
    values = spread_values(0, 2, 3, signed=signed, numel=3 * BLOCK)
    values[BLOCK + 5] = bad
    read = store_and_read(values, signed=signed, seed=seed)
    assert read[BLOCK : 2 * BLOCK].isnan().all()
    assert read[:BLOCK].isfinite().all()
    assert read[2 * BLOCK :].isfinite().all()


def test_negative_second_moments_count_as_zero() -> None:
    assert torch.equal(store_and_read(torch.tensor([-1.0, 1.0, -0.0]), signed=False), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(store_and_read(torch.tensor([-1.0, -2.0]), signed=False), torch.zeros(2))


@BOTH_MAPS
def test_views_of_a_larger_tensor_are_written_in_place(signed: bool) -> None:
    values = spread_values(0, 2, 3, signed=signed, numel=4 * BLOCK)
    codes, scales = store(values, signed=signed)
    whole_codes, whole_scales = torch.zeros_like(codes), torch.zeros_like(scales)
    for start in (0, 2 * BLOCK):
        piece, blocks = slice(start, start + 2 * BLOCK), slice(start // BLOCK, start // BLOCK + 2)
        quantize_(whole_codes[piece], whole_scales[blocks], values[piece], signed=signed, generator=None)
    assert torch.equal(whole_codes, codes)
    assert torch.equal(whole_scales, scales)


# ------------------------------------------------------------------------------------------------------------------- averages
def average_of(value: Tensor, start: Tensor, decay: float, steps: int, *, signed: bool, source: torch.Generator | None) -> Tensor:
    """What is stored of an exponential average that is fed a constant."""
    codes, scales = store(start, signed=signed)
    for _ in range(steps):
        average = decay * dequantize(codes, scales, signed=signed) + (1 - decay) * value
        quantize_(codes, scales, average, signed=signed, generator=source)
    return dequantize(codes, scales, signed=signed)


def test_a_slow_average_of_constant_squares_arrives_where_nearest_rounding_freezes() -> None:
    value = spread_values(0, 4, 3, signed=False, numel=8 * BLOCK).clamp(min=1e-4)
    start = 3 * value
    stochastic = average_of(value, start, 0.999, 5000, signed=False, source=generator(0)) / value
    assert float(stochastic.mean()) == pytest.approx(1 + 2 * 0.999**5000, abs=0.02)
    assert float(stochastic.std()) < 0.1
    frozen = average_of(value, start, 0.999, 5000, signed=False, source=None) / value
    assert float(frozen.median()) > 2.5


def test_a_first_moment_without_gradients_fades_where_nearest_rounding_freezes() -> None:
    value = torch.full((BLOCK,), 1.0)
    value[1:] = 0  # only one coordinate of the block still has a gradient
    start = torch.linspace(0.5, 1, BLOCK)
    faded = average_of(value, start, 0.9, 400, signed=True, source=generator(0))
    assert faded[0] == pytest.approx(1, rel=0.02)
    assert (faded[1:] == 0).all()
    assert (average_of(value, start, 0.9, 400, signed=True, source=None)[1:] > 1e-4).all()


def test_adam_with_8_bit_moments_learns_a_regression_as_well_as_with_fp32() -> None:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 40, generator=source) * torch.logspace(0, -1.5, 40)
    targets = inputs @ torch.randn(40, 16, generator=source) + 0.01 * torch.randn(512, 16, generator=source)

    def train(*, eight_bits: bool) -> float:
        weight = torch.zeros(640)
        shapes = code_shapes(640)
        first = torch.zeros(shapes[0], dtype=torch.uint8), torch.zeros(shapes[1])
        second = torch.zeros(shapes[0], dtype=torch.uint8), torch.zeros(shapes[1])
        m, v = torch.zeros(640), torch.zeros(640)
        batches, rounding = torch.Generator().manual_seed(1), generator(2)
        for step in range(1, 801):
            rows = torch.randint(0, 512, (64,), generator=batches)
            grad = (inputs[rows].T @ (inputs[rows] @ weight.view(40, 16) - targets[rows]) / 64).reshape(-1)
            if eight_bits:
                m, v = dequantize(*first, signed=True), dequantize(*second, signed=False)
            m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad.square()
            lr = 0.05 * (1 - step / 801)
            weight -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
            if eight_bits:
                quantize_(*first, m, signed=True, generator=rounding)
                quantize_(*second, v, signed=False, generator=rounding)
        return float((inputs @ weight.view(40, 16) - targets).square().mean())

    start = float(targets.square().mean())
    exact, rounded = train(eight_bits=False), train(eight_bits=True)
    assert exact < 0.01 * start
    assert rounded < 1.2 * exact
