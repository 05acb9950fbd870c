"""Windows and robust statistics against NumPy's own, the slow way."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink.orchestrator.curve import MOST_POINTS, Curve
from ultrathink.orchestrator.detectors.base import Baseline
from ultrathink.orchestrator.windows import Window, deviation, median

FLOATS = st.floats(-1e6, 1e6)


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_median_and_deviation_are_those_of_numpy(values: list[float]) -> None:
    array = np.array(values)
    assert median(array) == pytest.approx(float(np.median(array)), abs=1e-9)
    if len(values) > 1:
        expected = 1.4826 * float(np.median(np.abs(array - np.median(array))))
        assert deviation(array) == pytest.approx(expected, abs=1e-9)


def test_of_too_few_values_there_is_no_number() -> None:
    assert math.isnan(median(np.array([])))
    assert math.isnan(deviation(np.array([1.0])))


@given(st.integers(1, 9), st.lists(FLOATS, max_size=40), st.integers(0, 40))
def test_a_window_is_a_deque_of_so_many_values(size: int, values: list[float], cut: int) -> None:
    window, expected = Window(size), deque[float](maxlen=size)
    for index, value in enumerate(values):
        if index == cut:
            window.clear()
            expected.clear()
        window.add(value)
        expected.append(value)
        assert window.values.tolist() == list(expected)
        assert len(window) == len(expected)
        assert window.median() == pytest.approx(float(np.median(expected)), abs=1e-9)
        last = list(expected)[-3:]
        assert window.median(3) == pytest.approx(float(np.median(last)), abs=1e-9)


def test_a_baseline_learns_level_and_spread_beside_a_trend() -> None:
    rng, baseline = np.random.default_rng(0), Baseline()
    for step in range(300):
        baseline.add(10 - 0.01 * step + rng.normal(0, 0.1))
    assert baseline.level == pytest.approx(7.16, abs=0.1)  # that of 16 steps before the end
    assert baseline.deviation == pytest.approx(0.1, rel=0.3)
    assert abs(baseline.score(7.0)) < 2
    assert baseline.score(8.0) == pytest.approx(10, rel=0.3)


def test_a_baseline_says_nothing_of_few_values() -> None:
    baseline = Baseline()
    for _ in range(15):
        baseline.add(1.0)
        assert baseline.score(100.0) == 0
    baseline.add(1.0)
    assert baseline.score(100.0) > 100


def test_spikes_do_not_poison_a_baseline() -> None:
    rng = np.random.default_rng(0)
    clean, poisoned = Baseline(), Baseline()
    for step in range(400):
        value = rng.normal(0, 1)
        clean.add(value)
        poisoned.add(50.0 if step % 8 == 7 else value)
    assert poisoned.deviation < 1.6 * clean.deviation
    assert poisoned.score(50.0) > 20


def test_a_restarted_baseline_knows_the_spread_and_waits_for_a_level() -> None:
    rng, baseline = np.random.default_rng(0), Baseline()
    for value in rng.normal(0, 1, 100):
        baseline.add(value)
    before = baseline.deviation
    baseline.restart()
    assert baseline.score(1e6) == 0
    for value in rng.normal(5, 1, 8):
        baseline.add(value)
    assert baseline.level == pytest.approx(5, abs=1)
    assert baseline.deviation == pytest.approx(before, rel=0.3)


def test_a_curve_has_few_points_however_long_the_run() -> None:
    curve, steps = Curve(), np.arange(1, 20_001)
    for step in steps:
        curve.add(int(step), math.log(step))
    assert MOST_POINTS // 2 - 1 <= len(curve) <= MOST_POINTS
    assert curve.levels == pytest.approx(np.log(curve.steps), abs=0.5)
    assert curve.levels[-100:] == pytest.approx(np.log(curve.steps[-100:]), abs=0.01)
    assert np.all(np.diff(curve.steps) > 0)
    assert np.diff(curve.steps)[-1] == curve.block_size


def test_a_curve_knows_the_noise_of_single_values() -> None:
    curve, rng = Curve(), np.random.default_rng(0)
    for step in range(2000):
        curve.add(step, -0.001 * step + rng.normal(0, 0.05))
    assert curve.spread == pytest.approx(0.05, rel=0.25)


def test_a_cut_curve_ends_before_the_step() -> None:
    curve = Curve()
    for step in range(100):
        curve.add(step, 1.0)
    curve.cut(50)
    assert curve.steps[-1] <= 50
    before = len(curve)
    for step in range(51, 60):
        curve.add(step, 1.0)
    assert len(curve) == before + 1
