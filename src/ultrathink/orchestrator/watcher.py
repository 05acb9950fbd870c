"""Watches one run: passes every step to all detectors and keeps events, phases and the curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ultrathink.orchestrator.curve import Curve
from ultrathink.orchestrator.detectors import DETECTORS
from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Event, Finding, Incidents, in_order
from ultrathink.orchestrator.forecast import Forecast, ForecastCheck, forecast
from ultrathink.orchestrator.phases import Phase, Phases
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.signals import Signals


class Watcher(Remembers):
    """Observes the signals of a run in order, and finds events, phases and a forecast.

    The forecast is for ``total_steps``, without a budget for twice the steps so far. The signals
    of one step may come in several parts.
    """

    remembered = (
        "detectors",
        "_incidents",
        "_phases",
        "_curve",
        "_forecast_check",
        "_last_step",
        "total_steps",
        "_is_log",
    )

    def __init__(
        self, *, total_steps: int | None = None, detectors: Sequence[Detector] | None = None
    ) -> None:
        self.total_steps = total_steps
        made = [make() for make in DETECTORS] if detectors is None else detectors
        self.detectors: dict[str, Detector] = {type(one).__name__: one for one in made}
        self._incidents = Incidents()
        self._phases = Phases()
        self._curve = Curve()
        self._forecast_check = ForecastCheck()
        self._last_step: int | None = None
        self._is_log = True  # the curve has logarithms, until a loss is negative

    @property
    def events(self) -> list[Event]:
        """All events so far, by their first steps."""
        return in_order(self._incidents.events)

    @property
    def phases(self) -> list[Phase]:
        """The phases so far; the last one is the current one."""
        return list(self._phases.list)

    @property
    def phase(self) -> str | None:
        """The current phase; None before the first step."""
        return self._phases.list[-1].phase if self._phases.list else None

    def observe(self, signals: Signals) -> list[Event]:
        """Observe the figures of the next step; returns events that are new or more severe.

        A step before the last one means that the steps since then were undone.
        """
        found: list[Event] = []
        if self._last_step is not None and signals.step < self._last_step:
            found += self.rewind(signals.step - 1)
        self._last_step = signals.step
        findings = [f for one in self.detectors.values() for f in one.observe(signals)]
        changed = self._incidents.add(findings)
        loss = signals.finite("loss")
        if loss is not None:
            is_new = self._extend(signals.step, loss)
            if is_new and self._is_log:
                self._forecast_check.observe(self._curve)
            current = self._incidents.current(findings)
            self._phases.observe(signals.step, self._curve, is_new, current)
        return found + changed

    def _extend(self, step: int, loss: float) -> bool:
        """Add a loss to the curve; returns whether it has a new point."""
        if loss < 0 and self._is_log:
            self._curve, self._is_log = Curve(), False
        if not self._is_log:
            return self._curve.add(step, loss)
        return loss > 0 and self._curve.add(step, math.log(loss))

    @property
    def forecast_error(self) -> float | None:
        """The mean relative error of the forecasts checked so far; None before the first."""
        return self._forecast_check.error

    def finish(self) -> list[Event]:
        """The log has ended: judge what was waiting for later steps; returns new events."""
        return self._incidents.add([f for one in self.detectors.values() for f in one.finish()])

    def rewind(self, step: int) -> list[Event]:
        """Forget the steps after ``step``, undone by a rollback or a resume."""
        before, self._last_step = self._last_step, step
        for detector in self.detectors.values():
            detector.rewind(step)
        self._incidents.close()
        self._curve.cut(step)
        self._forecast_check.rewind(step)
        self._phases.rewind(step)
        if before is None or before <= step:
            return []
        text = f"the log goes back from step {before:,} to {step + 1:,}, as after a resume"
        return self._incidents.add([Finding(step + 1, "resumed", "info", text)])

    def forecast(self) -> Forecast | None:
        """The expected loss at the end of the budget.

        None while the curve is too short, and if a loss was negative: the fitted law is for losses
        above a floor.
        """
        if self._last_step is None or not self._is_log:
            return None
        step = self.total_steps or 2 * self._last_step
        return forecast(self._curve, max(step, self._last_step))

    def report(self) -> dict[str, Any]:
        """Events, phases and the forecast as one JSON object."""
        ahead = self.forecast()
        return {
            "events": [event.to_json() for event in self.events],
            "phases": [phase.to_json() for phase in self.phases],
            "forecast": ahead.to_json() if ahead is not None else None,
        }
