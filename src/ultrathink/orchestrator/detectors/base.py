"""What a detector is, and the baseline that several of them judge a signal against."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from ultrathink.core.protocols import State
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import NORMAL, Window, median


class Detector(Protocol):
    """Looks at every step once, in order, and remembers what it needs."""

    def observe(self, signals: Signals) -> list[Finding]:
        """Take the figures of the next step; what there is to say."""

    def finish(self) -> list[Finding]:
        """The log is over: judge what still waits for later steps."""

    def rewind(self, step: int) -> None:
        """What lies beyond ``step`` was undone (a rollback, a resume): forget it, and what is
        pending."""

    def state_dict(self) -> State:
        """What to remember over a restart."""

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned."""


class Rhythm:
    """Counts the observed steps between figures that come now and then, as validations do."""

    def __init__(self, since: int = 0) -> None:
        self.since = since  # observed steps since the last figure

    def step(self) -> None:
        """A step was observed, with the figure or without."""
        self.since += 1

    def pause(self) -> int:
        """The figure came: within how many observed steps the next two should come."""
        since, self.since = self.since, 0
        return 8 + 2 * since


FEWEST = 8  # values of which a level, and residuals of which a deviation, can be taken
MANY = 32  # residuals: eight more change little, and are measured together
UNSURE = 64.0  # a deviation of n residuals is taken 1 + 64/n² times as large: it may be too small


STEEP = 4.0  # deviations that the end of a fall may look like


class Baseline:
    """Where a signal usually is and how much it usually varies, trend taken out.

    The level is the median of the last ``level`` values; the residual of a value is its distance
    from the level before it. While a signal falls, residuals lie below zero: the score counts from
    their median, in robust standard deviations.
    """

    def __init__(self, *, level: int = 32, spread: int = 128, floor: float = 0.002) -> None:
        self.floor = floor  # of the deviation, so that a constant signal is no miracle
        self.level = math.nan  # the median of the last values
        self._last = Window(level)
        self._steps = Window(level)  # of those values
        self._residuals = Window(spread)
        self._num_new = 0  # residuals since they were last measured
        self._centre = 0.0
        self._deviation = math.inf

    def __len__(self) -> int:
        return len(self._residuals)

    @property
    def deviation(self) -> float:
        """The robust standard deviation of a value around the trend; infinite at the beginning."""
        return self._deviation

    def excess(self, value: float) -> float:
        """How far ``value`` lies above where the trend puts it."""
        return value - self.level - self._centre

    def score(self, value: float) -> float:
        """The excess in standard deviations; 0 while nothing can be said."""
        if len(self._last) < FEWEST or math.isinf(self._deviation):
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

    def state_dict(self) -> State:
        """What to remember over a restart."""
        return {
            "last": self._last.state_dict(),
            "steps": self._steps.state_dict(),
            "residuals": self._residuals.state_dict(),
            "num_new": self._num_new,
            "centre": self._centre,
            "deviation": self._deviation if math.isfinite(self._deviation) else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned."""
        values: dict[str, Any] = dict(state)
        self._last.load_state_dict(values["last"])
        self._steps.load_state_dict(values["steps"])
        self.level = self._last.median()
        self._residuals.load_state_dict(values["residuals"])
        self._num_new, self._centre = values["num_new"], values["centre"]
        self._deviation = math.inf if values["deviation"] is None else values["deviation"]
