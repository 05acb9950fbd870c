"""The interface of a detector, and the baseline that several of them compare a signal with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from ultrathink.core.protocols import State
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import NORMAL, Window, median

FEWEST = 8  # values needed for a level, and residuals for a deviation
MANY = 32  # from this many residuals on, the deviation is updated for every eight new ones
UNSURE = 64.0  # the deviation of n residuals is multiplied by 1 + 64/n²: it may be too small
STEEP = 4.0  # deviations by which a level can rise when a fall ends


class Detector(Remembers, ABC):
    """Observes every step once, in order, and keeps the state that it needs."""

    @abstractmethod
    def observe(self, signals: Signals) -> Iterable[Finding]:
        """Observe the figures of the next step; the caller consumes all findings at once."""

    def rewind(self, step: int) -> None:
        """Forget everything after ``step``, which was undone (rollback, resume), and pending
        findings."""

    def finish(self) -> list[Finding]:
        """The log has ended: judge what was waiting for later steps."""
        return []


class Rhythm(Remembers):
    """Counts the observed steps between occasional figures, such as validations."""

    remembered = ("since",)

    def __init__(self) -> None:
        self.since = 0  # observed steps since the last figure

    def step(self) -> None:
        self.since += 1

    def pause(self) -> int:
        """Note the figure; returns in how many observed steps the next two should come."""
        since, self.since = self.since, 0
        return 8 + 2 * since


class Baseline(Remembers):
    """The usual level of a signal and its usual variation, without the trend.

    The level is the median of the last ``level`` values; the residual of a value is its distance
    from the level before it. While a signal falls, residuals are negative, so the score is measured
    from their median, in robust standard deviations.
    """

    remembered = ("floor", "_last", "_steps", "_residuals", "_num_new", "_centre", "_deviation")

    def __init__(self, *, level: int = 32, spread: int = 128, floor: float = 0.002) -> None:
        self.floor = floor  # of the deviation, for signals that are nearly constant
        self.level = math.nan  # the median of the last values
        self._last = Window(level)
        self._steps = Window(level)  # of those values
        self._residuals = Window(spread)
        self._num_new = 0  # residuals since the last measurement
        self._centre = 0.0
        self._deviation: float | None = None

    def __len__(self) -> int:
        return len(self._residuals)

    @property
    def deviation(self) -> float:
        """The robust standard deviation of a value around the trend; infinite at the start."""
        return math.inf if self._deviation is None else self._deviation

    def excess(self, value: float) -> float:
        """How far ``value`` is above the trend."""
        return value - self.level - self._centre

    def score(self, value: float) -> float:
        """The excess in standard deviations; 0 while too little is known."""
        if len(self._last) < FEWEST or self._deviation is None:
            return 0.0
        return self.excess(value) / self._deviation

    def add(self, value: float, step: int = 0) -> None:
        """Add a usual value; ``step`` is for ``rewind``."""
        if len(self._last) >= FEWEST:
            self._residuals.add(value - self.level)
            self._num_new += 1
            if FEWEST <= len(self._residuals) < MANY or self._num_new >= FEWEST:
                self._measure()
        self._last.add(value)
        self._steps.add(step)
        self.level = self._last.median()

    def _measure(self) -> None:
        residuals = self._residuals.values
        centre = median(residuals)
        deviation = NORMAL * median(np.abs(residuals - centre))
        deviation *= 1 + UNSURE / len(residuals) ** 2
        self._centre = min(0.0, centre)
        # The end of a fall is not a jump: values are then above the level by the centre.
        self._deviation = max(deviation, -self._centre / STEEP, self.floor)
        self._num_new = 0

    def restart(self) -> None:
        """Forget the level and keep the spread: the signal has moved permanently."""
        self._last.clear()
        self._steps.clear()
        self.level = math.nan

    def rewind(self, step: int) -> None:
        count = int((self._steps.values > step).sum())
        for window in (self._last, self._steps):
            window.drop_last(count)
        self.level = self._last.median()

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.level = self._last.median()
