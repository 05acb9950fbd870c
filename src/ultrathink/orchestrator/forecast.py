"""The loss at the end of the budget, with an interval.

A power law above a floor, ``L(t) = E + A t^-a`` (Kaplan et al., 2020, arXiv 2001.08361; Hoffmann et
al., 2022, arXiv 2203.15556), is fitted to the curve without its beginning: for each of a number of
exponents the rest is a linear problem of least squares. The interval comes from how far such
forecasts were off on earlier parts of the same curve, from how much fall is still predicted, and
from how much of the run is to come: what a schedule does to the rate at the end is not in the
curve yet.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ultrathink.orchestrator.curve import Curve, Floats

LEVEL = 0.9  # 77 of 80 on ten real logs held (benchmarks/watch_logs.py)
FEWEST_POINTS = 16
SKIPPED = 0.1  # of the points, where warm-up and the first fall are
EXPONENTS = np.geomspace(0.03, 1.5, 64)
# By how much of the predicted fall, and of the noise of a step, the interval is wider than the
# forecasts on earlier parts of the curve were off; chosen on real logs (docs/watching.md).
BELOW, ABOVE = 1.0, 0.5
NOISE = 0.5
SCHEDULE = 0.03  # that the loss may fall by as the rate is lowered, of what is to come
LEAST = 0.001  # on either side, in the logarithm
LARGEST = 100.0  # logarithm of a loss that is forecast
PAST_ERRORS = 1.0


@dataclass(frozen=True)
class Forecast:
    """What the smoothed training loss should be at ``step``, and between which values."""

    step: int
    loss: float
    low: float
    high: float
    level: float  # how often the interval should hold the loss
    at_step: int  # when it was made

    def to_json(self) -> dict[str, Any]:
        """The forecast as a JSON object."""
        return asdict(self)


def forecast(curve: Curve, step: int) -> Forecast | None:
    """Forecast a curve of log losses at ``step``; None while the curve is too short."""
    steps, levels = np.maximum(curve.steps, 1.0), curve.levels
    if len(levels) < FEWEST_POINTS or step <= 0:
        return None
    now = float(steps[-1])
    unit = float(levels[-1])  # the law is fitted to losses of about one
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
    """The fitted law at ``step``, in the logarithm, moved to pass through the last points."""
    begin = int(SKIPPED * len(steps))
    times, losses = steps[begin:] / steps[-1], np.exp(levels[begin:])
    exponent, floor, factor = _fitted(times, losses)

    def law(time: Floats | float) -> Any:
        return np.log(np.maximum(floor + factor * time**-exponent, 1e-9))

    recent = min(8, len(times))
    offset = float(np.median(levels[-recent:] - law(times[-recent:])))
    return float(law(step / float(steps[-1]))) + offset


def _fitted(times: Floats, losses: Floats) -> tuple[float, float, float]:
    """Exponent, floor and factor with the least squares; floor and factor are not negative."""
    # Later points matter more: points lie evenly in steps, the law lives in their logarithm.
    weights = times / times[-1]
    powers = times ** -EXPONENTS[:, None]  # [exponents, points]
    total, of_losses = weights.sum(), weights @ losses
    of_powers, of_squares = powers @ weights, (powers * powers) @ weights
    of_both = powers @ (weights * losses)
    spread = np.maximum(total * of_squares - of_powers**2, 1e-12)
    factor = (total * of_both - of_powers * of_losses) / spread
    floor = (of_losses - factor * of_powers) / total
    # Where the best has a sign wrong, a law without a floor, or a constant.
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
    """How far forecasts as many times ahead were off on earlier parts of the curve."""
    errors = []
    for share in (0.35, 0.5, 0.65, 0.8):
        end = int(share * len(levels))
        ahead = min(float(steps[end - 1]) * ratio, float(steps[-1]))
        near = int(np.searchsorted(steps, ahead))
        truth = float(np.median(levels[max(0, near - 4) : near + 4]))
        if end >= FEWEST_POINTS // 2:
            errors.append(abs(_extrapolated(steps[:end], levels[:end], ahead) - truth))
    return float(np.median(errors)) if errors else 0.0
