"""The loss at the end of the budget, with an interval.

A power law above a floor, ``L(t) = E + A t^-a`` (Kaplan et al., 2020, arXiv 2001.08361; Hoffmann et
al., 2022, arXiv 2203.15556), is fitted to the curve without its start: for each of a number of
exponents the rest is a linear least-squares problem. The interval combines the errors of such
forecasts on earlier parts of the same curve, the fall that is still predicted, and the share of the
run that is left: the effect of the schedule's last part is not in the curve yet.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ultrathink.orchestrator.curve import Curve, Floats
from ultrathink.orchestrator.remembering import Remembers

LEVEL = 0.9  # on ten real logs 77 of 80 intervals held (benchmarks/watch_logs.py)
FEWEST_POINTS = 16
SKIPPED = 0.1  # first share of the points, with warm-up and the first fall
AHEAD = 1.25  # times the current step: about twenty checked forecasts in a run of 10,000 steps
EXPONENTS = np.geomspace(0.03, 1.5, 64)
# Shares of the predicted fall and of the noise of a step that are added to the errors of earlier
# forecasts; chosen on real logs (docs/watching.md).
BELOW, ABOVE = 1.0, 0.5
NOISE = 0.5
SCHEDULE = 0.03  # possible fall of the loss as the rate is lowered, times the share left
LEAST = 0.001  # on either side, in the logarithm
LARGEST = 100.0  # logarithm of the largest loss that is forecast
PAST_ERRORS = 1.0


@dataclass(frozen=True)
class Forecast:
    """The expected smoothed training loss at ``step``, with an interval."""

    step: int
    loss: float
    low: float
    high: float
    level: float  # the intended share of intervals that contain the loss
    at_step: int  # when it was made

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(curve: Curve, step: int) -> Forecast | None:
    """Forecast a curve of log losses at ``step``; None while the curve is too short."""
    steps, levels = np.maximum(curve.steps, 1.0), curve.levels
    if len(levels) < FEWEST_POINTS or step <= 0:
        return None
    now = float(steps[-1])
    unit = float(levels[-1])  # scale: the law is fitted to losses near one
    levels = np.clip(levels - unit, -LARGEST, LARGEST)
    value = _extrapolated(steps, levels, step)
    fall = max(0.0, float(np.median(levels[-8:])) - value)
    past = _past_error(steps, levels, step / now)
    noise = LEAST + NOISE * min(curve.spread, LARGEST)
    to_come = SCHEDULE * max(0.0, 1 - now / step)
    low = value - to_come - BELOW * fall - PAST_ERRORS * past - noise
    high = value + ABOVE * fall + PAST_ERRORS * past + noise
    loss, low, high = (math.exp(min(max(unit + x, -700.0), 700.0)) for x in (value, low, high))
    return Forecast(step, loss, low, high, LEVEL, at_step=round(now))


def _extrapolated(steps: Floats, levels: Floats, step: float) -> float:
    """The logarithm of the fitted law at ``step``, shifted to pass through the last points."""
    begin = int(SKIPPED * len(steps))
    times, losses = steps[begin:] / steps[-1], np.exp(levels[begin:])
    exponent, floor, factor = _fitted(times, losses)

    def law(time: Floats | float) -> Any:
        return np.log(np.maximum(floor + factor * time**-exponent, 1e-9))

    recent = min(8, len(times))
    offset = float(np.median(levels[-recent:] - law(times[-recent:])))
    return float(law(step / float(steps[-1]))) + offset


def _fitted(times: Floats, losses: Floats) -> tuple[float, float, float]:
    """The least-squares exponent, floor and factor; floor and factor are not negative."""
    # Later points weigh more: points are spaced evenly in steps, the law is in their logarithm.
    weights = times / times[-1]
    powers = times ** -EXPONENTS[:, None]  # [exponents, points]
    total, of_losses = weights.sum(), weights @ losses
    of_powers, of_squares = powers @ weights, (powers * powers) @ weights
    of_both = powers @ (weights * losses)
    spread = np.maximum(total * of_squares - of_powers**2, 1e-12)
    factor = (total * of_both - of_powers * of_losses) / spread
    floor = (of_losses - factor * of_powers) / total
    # If the best has a negative floor or factor, use a law without a floor, or a constant.
    free = (floor >= 0) & (factor >= 0)
    candidates = (
        (np.where(free, floor, of_losses / total), np.where(free, factor, 0.0)),
        (np.zeros_like(floor), of_both / of_squares),
    )
    best = (math.inf, 0.0, 0.0, 0.0)
    for floors, factors in candidates:
        errors = ((floors[:, None] + factors[:, None] * powers - losses) ** 2) @ weights
        at = int(errors.argmin())
        if errors[at] < best[0]:
            best = (float(errors[at]), float(EXPONENTS[at]), float(floors[at]), float(factors[at]))
    return best[1:]


def _past_error(steps: Floats, levels: Floats, ratio: float) -> float:
    """The error of forecasts over the same ratio of steps, on earlier parts of the curve."""
    errors = []
    for share in (0.35, 0.5, 0.65, 0.8):
        end = int(share * len(levels))
        ahead = min(float(steps[end - 1]) * ratio, float(steps[-1]))
        near = int(np.searchsorted(steps, ahead))
        truth = float(np.median(levels[max(0, near - 4) : near + 4]))
        if end >= FEWEST_POINTS // 2:
            errors.append(abs(_extrapolated(steps[:end], levels[:end], ahead) - truth))
    return float(np.median(errors)) if errors else 0.0


class ForecastCheck(Remembers):
    """Makes one forecast at a time, for a step not far ahead, and compares it at that step.

    The forecast of the end of a run can be checked only at the end; these are made in the same way.
    """

    remembered = ("_due", "_made_at", "_loss", "_sum", "_count")

    def __init__(self) -> None:
        self._due: int | None = None  # the step that the forecast is for
        self._made_at = 0
        self._loss = 0.0
        self._sum = 0.0
        self._count = 0

    @property
    def error(self) -> float | None:
        """Mean of ``|forecast / loss - 1|`` over the forecasts checked; None before the first."""
        return self._sum / self._count if self._count else None

    def observe(self, curve: Curve) -> None:
        """Check a curve of log losses with a new point, whose median is the actual value."""
        step = round(float(curve.steps[-1]))
        if self._due is not None and step >= self._due:
            came = math.exp(min(max(float(curve.levels[-1]), -700.0), 700.0))
            error = abs(self._loss / came - 1)
            if math.isfinite(error):
                self._sum, self._count = self._sum + error, self._count + 1
            self._due = None
        if self._due is None:
            ahead = forecast(curve, math.ceil(AHEAD * step))
            if ahead is not None:
                self._due, self._made_at, self._loss = ahead.step, step, ahead.loss

    def rewind(self, step: int) -> None:
        """Drop forecasts made from steps after ``step``, which were undone."""
        if self._made_at > step:
            self._due = None
