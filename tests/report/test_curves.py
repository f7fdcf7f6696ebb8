"""Long lines are made short without losing what matters; axes show what they say."""

from __future__ import annotations

import math
import re
import statistics
from xml.etree import ElementTree

import numpy as np
import pytest

from ngpt.report.curves import smoothed, thinned
from ngpt.report.parts import Chart, Line
from ngpt.report.scales import Scale, figure, scale_for, short
from ngpt.report.svg import beyond, chart_svg


def test_thinning_keeps_the_lowest_and_the_highest_of_every_part() -> None:
    x, y = np.arange(1_000_000.0), np.random.default_rng(0).normal(size=1_000_000)
    y[123_456], y[777_777] = 50.0, -50.0
    few_x, few_y = thinned(x, y, 250)
    assert len(few_x) <= 502
    assert (np.diff(few_x) > 0).all()
    assert (y[few_x.astype(int)] == few_y).all()
    for first in range(0, 1_000_000, 4000):
        part = few_y[(few_x >= first - 1) & (few_x <= first + 4000)]
        assert part.min() <= y[first : first + 4000].min()
        assert part.max() >= y[first : first + 4000].max()


def test_thinning_leaves_short_lines_alone_and_keeps_breaks() -> None:
    x, y = np.arange(1000.0), np.ones(1000)
    y[400:600] = math.nan
    assert thinned(x[:20], y[:20], 10)[0] is not None
    assert len(thinned(x[:20], y[:20], 10)[0]) == 20
    few_x, few_y = thinned(x, y, 10)
    assert np.isnan(few_y[(few_x >= 400) & (few_x < 600)]).all()
    assert ((few_x >= 400) & (few_x < 600)).any()
    uneven = np.concatenate([np.linspace(0, 1, 999), [1e6]])  # nearly all parts of the axis are empty
    assert thinned(uneven, y, 10)[0][-1] == 1e6


@pytest.mark.parametrize(("count", "window"), [(30, 5), (1000, 41)])
def test_a_smoothed_value_is_the_median_of_its_neighbours(count: int, window: int) -> None:
    x, y = np.arange(float(count)), np.random.default_rng(1).normal(size=count)
    places, values = smoothed(x, y, window)
    assert (places[0], places[-1], len(places)) == (0, count - 1, min(count, 400))
    for place, value in zip(places.astype(int), values, strict=True):
        reach = min(window // 2, place, count - 1 - place)
        assert value == pytest.approx(statistics.median(y[place - reach : place + reach + 1]))


def test_a_single_wild_value_leaves_no_trace_in_a_smoothed_line_and_nan_is_left_out() -> None:
    y = np.full(50, 3.0)
    y[20], y[30] = 1e9, math.nan
    assert (smoothed(np.arange(50.0), y, 5)[1] == 3.0).all()


def drawn(chart: Chart) -> tuple[ElementTree.Element, dict[str, tuple[float, float]]]:
    """The picture, and where its labels stand."""
    picture = ElementTree.fromstring(chart_svg(chart))
    return picture, {text.text or "": (float(text.attrib["x"]), float(text.attrib["y"])) for text in picture.iter("text")}


def points(picture: ElementTree.Element, look: str) -> list[tuple[float, float]]:
    path = next(path for path in picture.iter("path") if look in path.attrib.get("class", "").split())
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.attrib["d"])]


@pytest.mark.parametrize("log", [False, True])
def test_a_line_passes_its_values_at_the_height_of_their_labels(log: bool) -> None:
    x, y = np.array([0.0, 1000.0, 2000.0]), np.array([1.0, 10.0, 100.0]) if log else np.array([20.0, 60.0, 100.0])
    picture, labels = drawn(Chart("t", "tokens", [Line("a", 0, x, y)], log=log))
    for (across, down), label_x, label_y in zip(points(picture, "line"), ("0", "1k", "2k"), map(short, y), strict=True):
        assert across == pytest.approx(labels[label_x][0], abs=0.11)
        assert down == pytest.approx(labels[label_y][1] - 4, abs=0.11)


def test_a_spike_does_not_squeeze_the_rest_and_is_counted() -> None:
    y = np.linspace(8, 4, 200)
    y[100] = 5000.0
    chart = Chart("t", "tokens", [Line("a", 0, np.arange(200.0), y)])
    assert beyond(chart) == (1, 5000.0)
    edge = scale_for([y]).high
    assert 8 < edge < 20
    assert min(down for _, down in points(drawn(chart)[0], "line")) >= 12  # it ends at the edge


def test_the_first_value_of_a_loss_is_inside_however_high_it_is() -> None:
    y = np.concatenate([[50.0], np.full(500, 4.0)])
    assert scale_for([y]).high >= 50
    assert scale_for([y], whole=False).high < 10


def test_a_break_lifts_the_pen_and_a_value_alone_is_a_dot() -> None:
    y = np.array([1.0, 2.0, math.nan, 3.0, math.nan, 4.0, 5.0])
    picture, _ = drawn(Chart("t", "tokens", [Line("a", 0, np.arange(7.0), y)]))
    path = next(path for path in picture.iter("path") if "line" in path.attrib.get("class", ""))
    assert (path.attrib["d"].count("M"), path.attrib["d"].count("L")) == (3, 2)
    assert len(list(picture.iter("circle"))) == 1


@pytest.mark.parametrize("scale", [Scale(3.1, 3.3), Scale(0, 1.2e9), Scale(1, 3e7, log=True), Scale(2.3, 2.9, log=True), Scale(-5, 5)])
def test_ticks_are_few_and_inside(scale: Scale) -> None:
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    assert len({short(tick) for tick in ticks}) == len(ticks)


def test_numbers_are_written_to_the_digits_that_matter() -> None:
    assert [figure(value) for value in (3.14159, 0.1, 0.0123456, 1234567.8, 0.0, None, math.nan, 1.5e-7)] == [
        *("3.142", "0.1000", "0.01235", "1,234,568", "0", "-", "-", "1.500e-07")
    ]
    assert [short(value) for value in (0, 1.5e6, 2e9, 950, 0.004, 3e20)] == ["0", "1.5M", "2B", "950", "0.004", "3e+20"]
