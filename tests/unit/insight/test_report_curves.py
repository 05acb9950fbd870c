"""Curves of the report: what thinning keeps, what a scale holds, where labels stand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink.insight.report.charts import Line, Span, chart
from ultrathink.insight.report.curves import (
    Series,
    round_values,
    scale_of,
    smoothed,
    thinned,
    ticks_of,
)
from ultrathink.monitoring.plot import Scale


def noisy(count: int) -> Series:
    steps = np.arange(1.0, count + 1)
    return Series(steps, 2 + 4 * np.exp(-steps / 2000) + 0.1 * np.sin(12.9898 * steps))


def test_a_long_curve_keeps_its_extremes_and_ends() -> None:
    curve = noisy(100_000)
    curve.values[41_234], curve.values[77_777] = 30.0, -5.0
    curve.values[50_000], curve.values[60_000:61_000] = math.nan, math.inf  # gaps stay
    thin = thinned(curve)
    assert 1000 < len(thin) <= 2100
    assert math.isnan(thin.values[list(thin.steps).index(50_001)])
    assert np.isinf(thin.values).any()
    assert {30.0, -5.0} <= set(thin.values)
    assert (thin.steps[0], thin.steps[-1]) == (1, 100_000)
    assert (np.diff(thin.steps) > 0).all()
    short = noisy(500)
    assert thinned(short) is short


def test_a_smoothed_curve_follows_the_middle_and_passes_over_single_spikes() -> None:
    curve = noisy(4000)
    curve.values[2000] = 1000.0
    smooth = smoothed(curve)
    truth = 2 + 4 * np.exp(-smooth.steps / 2000)
    assert np.abs(smooth.values - truth).max() < 0.08
    assert len(smoothed(noisy(10))) == 0


def test_the_linear_scale_leaves_out_the_first_fall_and_single_spikes() -> None:
    values = np.full(2000, 2.0) + 0.1 * np.sin(np.arange(2000.0))
    values[:20], values[1000] = 90.0, 500.0
    scale = scale_of([Series(np.arange(2000.0), values)])
    assert scale is not None
    assert 1.8 < scale.low < 1.9
    assert 2.1 < scale.high < 2.2


def test_the_logarithmic_scale_holds_all_of_it() -> None:
    scale = scale_of([Series.of([(1, 500.0), (2, 0.5)])], is_log=True)
    assert scale is not None
    shares = [scale.share(value) for value in (500.0, 0.5)]
    assert 0.9 < shares[0] < 1
    assert 0 < shares[1] < 0.1
    assert scale_of([Series.of([(1, 2.0), (2, -0.5)])], is_log=True) is None
    assert scale_of([Series.of([(1, math.nan)])]) is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    for ticks in (
        round_values(low, low + span, 6),
        ticks_of(Scale(low, low + span)),
        ticks_of(Scale(abs(low) + 1e-3, (abs(low) + 1e-3) * (1 + span), is_log=True)),
    ):
        assert 1 <= len(ticks) <= 7
        assert ticks == sorted(set(ticks))
    ticks = round_values(low, low + span, 6)
    room = 1e-6 * (span + abs(low))
    assert low - room <= ticks[0]
    assert ticks[-1] <= low + span + room


def test_a_line_has_a_gap_where_there_is_no_number() -> None:
    curve = Series.of([(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0)])
    drawn = chart("x", "X", [Line("k", "", curve)], Span(0, 4))
    assert drawn is not None
    ((_, path),) = drawn.layers[0].paths
    assert (path.count("M"), path.count("L")) == (2, 2)
    assert chart("x", "X", [Line("k", "", Series.of([]))], Span(0, 4)) is None


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0, 0.0], [5.0]])
def test_a_constant_curve_has_a_scale(values: list[float]) -> None:
    drawn = chart("x", "X", [Line("k", "", Series.of(list(enumerate(values))))], Span(0, 2))
    assert drawn is not None
    assert "nan" not in str(drawn.layers)
