"""Forecasts at shares of the budget, from the records until then, against the final loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ultrathink.insight.log_analysis import LogAnalysis
from ultrathink.insight.logs.log import Log, LogSignals
from ultrathink.monitoring.plot import Point
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.forecast import Forecast
from ultrathink.orchestrator.phases import Phase
from ultrathink.orchestrator.windows import median

SHARES = (0.25, 0.5, 0.75)  # of the budget
_FINAL_SHARE, _FEWEST_FINAL = 0.01, 16  # logged steps whose median is the final loss


@dataclass(frozen=True)
class Prediction:
    """A forecast made after a share of the budget, from the records until then."""

    share: float
    forecast: Forecast
    came: float | None  # the smoothed training loss at the end; None before the end

    @property
    def is_inside(self) -> bool | None:
        """Whether the final loss lies in the interval; None before the end."""
        if self.came is None:
            return None
        return self.forecast.low <= self.came <= self.forecast.high


@dataclass(frozen=True)
class Replay:
    """What the watcher finds in a run's log now."""

    phases: list[Phase]
    events: list[Event]
    undone: list[list[Point]]  # training losses that a resume or a rollback undid
    predicted: list[Prediction]
    forecast: Forecast | None  # None at the end of the run


def replay(log: Log, *, losses: Iterable[Point]) -> Replay:
    """Watch a log from its beginning; ``losses``, without undone ones, give the final loss."""
    analysis = LogAnalysis(log)
    made: dict[float, Forecast] = {}
    for signals in log.signals():
        _predict(analysis, signals, made)
        analysis.observe(signals)
    analysis.finish()
    last = max((step for course in analysis.courses for step in course.steps), default=0)
    is_at_end = log.total_steps is not None and last >= log.total_steps
    came = _final(losses) if is_at_end else None
    return Replay(
        phases=[phase for _, phase in analysis.phases()],
        events=[event for _, event in analysis.events()],
        undone=[part for course in analysis.courses for part in course.undone],
        predicted=[Prediction(share, ahead, came) for share, ahead in made.items()],
        forecast=None if is_at_end else analysis.forecast(),
    )


def _predict(analysis: LogAnalysis, following: LogSignals, made: dict[float, Forecast]) -> None:
    """Make the forecasts that are due before a record, from the records before it."""
    total = analysis.log.total_steps
    if total is None or not analysis.courses:
        return
    for share in SHARES:
        if share not in made and following.step > share * total:
            ahead = analysis.forecast()
            # One that could not be made when it was due is left out.
            if ahead is not None and ahead.step == total and following.step < (share + 0.1) * total:
                made[share] = ahead


def _final(losses: Iterable[Point]) -> float | None:
    """The median of the last logged losses: the forecast predicts the smoothed loss."""
    finite = [loss for _, loss in losses if math.isfinite(loss)]
    if not finite:
        return None
    count = max(_FEWEST_FINAL, int(_FINAL_SHARE * len(finite)))
    return median(np.array(finite[-count:]))
