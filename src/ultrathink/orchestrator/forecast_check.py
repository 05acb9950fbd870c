"""Measures the error of loss forecasts, once their step is reached."""

from __future__ import annotations

import math

from ultrathink.orchestrator.curve import Curve
from ultrathink.orchestrator.forecast import forecast
from ultrathink.orchestrator.remembering import Remembers

AHEAD = 1.25  # times the current step: about twenty forecasts in a run of 10,000 steps


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
