"""The training time of a run, on one clock for all its processes."""

from __future__ import annotations

import time

from ultrathink.training.run_state import Progress


class Clock:
    """Seconds of training over all sessions of a run, compilation included.

    ``progress.elapsed_s`` is the time of earlier sessions; ``stop`` updates it.
    """

    def __init__(self, progress: Progress) -> None:
        self.agreed_s: float | None = None  # of the first process, from a boundary to the next step
        self.num_steps = 0  # taken in this session, including undone ones
        self.steps_s = 0.0  # their seconds
        self._progress = progress
        self._zero: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds so far; between a boundary and the next step the same on all processes."""
        if self.agreed_s is not None:
            return self.agreed_s
        if self._zero is None:
            return self._progress.elapsed_s
        return time.perf_counter() - self._zero

    def start(self) -> None:
        """Continue from where the last session stopped."""
        self._zero = time.perf_counter() - self._progress.elapsed_s

    def stop(self) -> None:
        """Stop the clock."""
        self._progress.elapsed_s, self._zero = self.elapsed_s, None

    def count_step(self, seconds: float) -> None:
        """Count a step of this duration."""
        self.num_steps += 1
        self.steps_s += seconds
