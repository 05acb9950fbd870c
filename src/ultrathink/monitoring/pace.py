"""The speed of a run, and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MIN_WINDOW_S = 60.0
MIN_EVIDENCE_S = 2.0
POINTS = 200


class Pace:
    """The recent time per step, everything between steps included.

    It is measured from the end of the first step, which compiles, over the last minute or the last
    third of the run, whichever is longer, so that one validation does not dominate it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._points: deque[tuple[float, int]] = deque()
        self._start: float | None = None

    def update(self, step: int) -> None:
        """Note that ``step`` has just finished."""
        now = self._clock()
        if self._start is None:
            self._start = now
        window = max(MIN_WINDOW_S, (now - self._start) / 3)
        # The newest point is always kept; older ones are thinned to keep this cheap.
        if len(self._points) >= 2 and now - self._points[-2][0] < window / POINTS:
            self._points.pop()
        self._points.append((now, step))
        while len(self._points) > 2 and now - self._points[0][0] > window:
            self._points.popleft()

    def seconds_per_step(self) -> float | None:
        """Seconds from one step to the next; None while too few are measured."""
        if len(self._points) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._points[0], self._points[-1]
        if last_step <= first_step or last_time - first_time < MIN_EVIDENCE_S:
            return None
        return (last_time - first_time) / (last_step - first_step)

    def seconds_left(self, total_steps: int) -> float | None:
        """Seconds until ``total_steps`` are done; None while too few are measured."""
        pace = self.seconds_per_step()
        if pace is None:
            return None
        last_time, last_step = self._points[-1]
        return max(0.0, (total_steps - last_step) * pace - (self._clock() - last_time))
