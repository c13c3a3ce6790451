"""Laws of the charts: every value lies in its frame, order is kept, and thinning keeps the ends."""

import math
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.ablation.verdicts import t_quantile
from stages.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, linear_ticks, short, thin
from stages.report.intervals import mean_series

finite = st.floats(-1e12, 1e12, allow_subnormal=False).filter(lambda value: value == 0 or abs(value) > 1e-12)
points = st.lists(st.tuples(st.integers(0, 10**9).map(float), st.none() | finite), min_size=1, max_size=40)


def chart_of(*lines: Series) -> Chart:
    return Chart("key", "title", "x", "y", "text", lines)


@given(points.filter(lambda some: any(y is not None for _, y in some)))
def test_every_value_lies_in_the_frame(some: list[tuple[float, float | None]]) -> None:
    chart = chart_of(Series("one", sorted(some, key=lambda point: point[0])))
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", chart.path(chart.lines[0])):
        assert LEFT - 0.1 <= float(x) <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= float(y) <= HEIGHT - BOTTOM + 0.1
    assert len(chart.y_ticks) <= 12


@given(st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=2, unique=True))
def test_a_larger_value_is_higher(values: list[float]) -> None:
    chart = chart_of(Series("one", [(0.0, min(values)), (1.0, max(values))]))
    assert chart.y(max(values)) <= chart.y(min(values))


def test_a_wide_range_is_logarithmic_and_one_with_zero_is_not() -> None:
    assert chart_of(Series("one", [(0.0, 0.001), (1.0, 10.0)])).is_logarithmic
    assert not chart_of(Series("one", [(0.0, 0.0), (1.0, 10.0)])).is_logarithmic
    assert not chart_of(Series("one", [(0.0, 1.0), (1.0, 2.0)])).is_logarithmic


def test_a_gap_breaks_the_line_and_an_empty_line_is_left_out() -> None:
    chart = chart_of(Series("one", [(0.0, 1.0), (1.0, None), (2.0, 3.0)]), Series("none", [(0.0, None)]))
    assert [one.name for one in chart.lines] == ["one"]
    assert chart.path(chart.lines[0]).count("M") == 2


@given(st.integers(1, 2000))
def test_thinning_keeps_the_last_point_the_order_and_the_mean(count: int) -> None:
    some = [(float(number), float(number % 7)) for number in range(count)]
    kept = thin(some)
    assert len(kept) <= 240
    assert kept[-1] == some[-1]
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})


@given(finite, finite)
def test_ticks_are_even_and_hold_the_range(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return
    ticks = linear_ticks(low, high, 5, outside=True)
    assert ticks[0] <= low + 1e-6 * (high - low)
    assert ticks[-1] >= high - 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 9


def test_numbers_are_short() -> None:
    assert [short(value) for value in (None, 0.0, 25600.0, 0.012345, 1234.5, 1e-9)] == [
        "–", "0", "25,600", "0.0123", "1,234", "1e-09"]  # fmt: skip


def test_student_t_agrees_with_its_distribution() -> None:
    """P(|T| > t) = 5 % by numerical integration of the density."""
    for freedom in (1, 2, 5, 30, 31, 63):
        constant = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        t, steps = t_quantile(0.975, freedom), 20000
        density = [constant * (1 + (i * t / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
        inside = 2 * t / steps * (sum(density) - (density[0] + density[-1]) / 2)
        assert inside == pytest.approx(0.95, abs=2e-4)


def test_the_mean_of_seeds_has_its_interval_where_all_have_a_value() -> None:
    lines = [[(0.0, 1.0), (1.0, 2.0), (2.0, None)], [(0.0, 3.0), (1.0, 2.0), (2.0, 5.0)], [(0.0, 5.0), (1.0, 2.0)]]
    series = mean_series("three", lines)
    assert series.points == [(0.0, 3.0), (1.0, 2.0)]
    ((x, low, high),) = series.band  # where they do not differ, there is none
    half = 4.3026527297 * statistics.stdev([1.0, 3.0, 5.0]) / math.sqrt(3)
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    assert x == 0.0
    two = mean_series("two", lines[:2])
    assert (two.name, two.band) == ("two (mean)", [])
