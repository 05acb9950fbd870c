"""What a detector is, and the baseline that several of them judge a signal against."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from ultrathink.core.protocols import State
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import NORMAL, Window, median

FEWEST = 8  # values of which a level, and residuals of which a deviation, can be taken
MANY = 32  # residuals: eight more change little, and are measured together
UNSURE = 64.0  # a deviation of n residuals is taken 1 + 64/n² times as large: it may be too small
STEEP = 4.0  # deviations that the end of a fall may look like


class Detector(Remembers, ABC):
    """Looks at every step once, in order, and remembers what it needs."""

    @abstractmethod
    def observe(self, signals: Signals) -> list[Finding]:
        """Take the figures of the next step; what there is to say."""

    @abstractmethod
    def rewind(self, step: int) -> None:
        """What lies beyond ``step`` was undone (a rollback, a resume): forget it, and what is
        pending."""

    def finish(self) -> list[Finding]:
        """The log is over: judge what still waits for later steps."""
        return []


class Rhythm(Remembers):
    """Counts the observed steps between figures that come now and then, as validations do."""

    remembered = ("since",)

    def __init__(self) -> None:
        self.since = 0  # observed steps since the last figure

    def step(self) -> None:
        """A step was observed, with the figure or without."""
        self.since += 1

    def pause(self) -> int:
        """The figure came: within how many observed steps the next two should come."""
        since, self.since = self.since, 0
        return 8 + 2 * since


class Baseline(Remembers):
    """Where a signal usually is and how much it usually varies, trend taken out.

    The level is the median of the last ``level`` values; the residual of a value is its distance
    from the level before it. While a signal falls, residuals lie below zero: the score counts from
    their median, in robust standard deviations.
    """

    remembered = (
        "floor",
        "_last",
        "_steps",
        "_residuals",
        "_num_new",
        "_centre",
        "_deviation",
    )

    def __init__(self, *, level: int = 32, spread: int = 128, floor: float = 0.002) -> None:
        self.floor = floor  # of the deviation, so that a constant signal is no miracle
        self.level = math.nan  # the median of the last values
        self._last = Window(level)
        self._steps = Window(level)  # of those values
        self._residuals = Window(spread)
        self._num_new = 0  # residuals since they were last measured
        self._centre = 0.0
        self._deviation: float | None = None

    def __len__(self) -> int:
        return len(self._residuals)

    @property
    def deviation(self) -> float:
        """The robust standard deviation of a value around the trend; infinite at the beginning."""
        return math.inf if self._deviation is None else self._deviation

    def excess(self, value: float) -> float:
        """How far ``value`` lies above where the trend puts it."""
        return value - self.level - self._centre

    def score(self, value: float) -> float:
        """The excess in standard deviations; 0 while nothing can be said."""
        if len(self._last) < FEWEST or self._deviation is None:
            return 0.0
        return self.excess(value) / self._deviation

    def add(self, value: float, step: int = 0) -> None:
        """Learn a value that is thought to be usual; ``step`` is for ``rewind``."""
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
        # A fall may end, which is no jump: the centre is then what a value lies above it.
        self._deviation = max(deviation, -self._centre / STEEP, self.floor)
        self._num_new = 0

    def restart(self) -> None:
        """Forget the level, keep the spread: the signal has moved elsewhere for good."""
        self._last.clear()
        self._steps.clear()
        self.level = math.nan

    def rewind(self, step: int) -> None:
        """Forget the values beyond ``step``, which lie where the signal was later."""
        count = int((self._steps.values > step).sum())
        for window in (self._last, self._steps):
            window.drop_last(count)
        self.level = self._last.median()

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.level = self._last.median()
