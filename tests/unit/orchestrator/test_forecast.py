"""The forecast, on power laws whose end is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ultrathink.orchestrator.curve import Curve
from ultrathink.orchestrator.forecast import FEWEST_POINTS, forecast
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.watcher import Watcher


def curve_of(losses: np.ndarray, start: int = 1) -> Curve:
    curve = Curve()
    for step, loss in enumerate(losses, start):
        curve.add(step, math.log(loss))
    return curve


def power_law(count: int, floor: float, exponent: float, noise: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = np.arange(1, count + 1)
    return (floor + 9 * steps**-exponent) * np.exp(noise * rng.standard_normal(count))


@pytest.mark.parametrize("floor", [0.0, 1.5])
@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.7])
def test_a_power_law_is_continued(floor: float, exponent: float) -> None:
    losses = power_law(1000, floor, exponent, 0.002, seed=0)
    truth = floor + 9 * 4000.0**-exponent
    predicted = forecast(curve_of(losses), 4000)
    assert predicted is not None
    assert predicted.loss == pytest.approx(truth, rel=0.05)
    assert predicted.low < truth < predicted.high


def test_the_interval_holds_as_often_as_it_says_and_is_not_idle() -> None:
    held, widths = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        exponent, floor = rng.uniform(0.1, 0.6), rng.uniform(0.5, 2.5)
        losses = power_law(600, floor, exponent, rng.uniform(0.003, 0.05), seed)
        ahead = int(600 * rng.uniform(1.1, 5))
        predicted = forecast(curve_of(losses), ahead)
        assert predicted is not None
        held.append(predicted.low < floor + 9 * ahead**-exponent < predicted.high)
        widths.append(math.log(predicted.high / predicted.low))
        assert predicted.low < predicted.loss < predicted.high
        assert predicted.level == 0.9
    assert np.mean(held) >= 0.9
    assert np.median(widths) < 0.25


def test_there_is_none_of_a_short_curve() -> None:
    assert forecast(curve_of(np.full(8 * FEWEST_POINTS - 1, 2.0)), 500) is None
    assert forecast(curve_of(np.full(8 * FEWEST_POINTS, 2.0)), 500) is not None


@pytest.mark.parametrize(
    "losses",
    [
        np.full(400, 2.0),
        np.geomspace(1e-12, 1e12, 400),
        np.geomspace(1e12, 1e-12, 400),
        np.where(np.arange(400) % 2, 1e-300, 1e300),
        np.full(400, 5e-324),
        np.full(400, 1e308),
    ],
    ids=["constant", "rising", "falling", "wild", "smallest", "largest"],
)
@pytest.mark.parametrize("start", [-1000, 0, 1, 10**9])
def test_it_is_finite_whatever_the_losses(losses: np.ndarray, start: int) -> None:
    predicted = forecast(curve_of(losses, start), start + 4000)
    if predicted is not None:
        assert all(math.isfinite(x) for x in (predicted.loss, predicted.low, predicted.high))
        assert predicted.low <= predicted.loss <= predicted.high


def test_forecasts_that_came_due_are_compared_with_what_came() -> None:
    watcher = Watcher()
    for step in range(1, 130):
        watcher.observe(Signals(step, {"loss": 4 * step**-0.2 + 1}))
    assert watcher.forecast_error is None  # the first is made at its sixteenth point, for 156
    for step in range(130, 800):
        watcher.observe(Signals(step, {"loss": 4 * step**-0.2 + 1}))
    foreseen = watcher.forecast_error
    assert foreseen is not None
    assert foreseen < 0.01
    again = Watcher()
    again.load_state_dict(json.loads(json.dumps(watcher.state_dict())))
    for one in (watcher, again):
        for step in range(800, 1400):
            one.observe(Signals(step, {"loss": 8 * step**-0.2 + 2}))  # nobody could know
    assert watcher.forecast_error == again.forecast_error
    assert watcher.forecast_error is not None
    assert watcher.forecast_error > 5 * foreseen


def test_what_was_predicted_from_steps_that_were_undone_counts_no_more() -> None:
    def twice(step: int) -> float:
        return 2 * (4 * step**-0.2 + 1)

    watcher = Watcher()
    for step in range(1, 100):
        watcher.observe(Signals(step, {"loss": 4 * step**-0.2 + 1}))
    for step in range(100, 150):  # the first forecast is made in here
        watcher.observe(Signals(step, {"loss": twice(step)}))
    watcher.rewind(99)
    for step in range(100, 400):
        watcher.observe(Signals(step, {"loss": 4 * step**-0.2 + 1}))
    assert watcher.forecast_error is not None
    assert watcher.forecast_error < 0.01
