"""How long a run has trained, on the clock that all its processes go by."""

from __future__ import annotations

import time

from ultrathink.training.run_state import Progress


class Clock:
    """Seconds of training over all sessions of a run, compilation included.

    ``progress.elapsed_s`` is what earlier sessions took, and is brought up to date by ``stop``.
    """

    def __init__(self, progress: Progress) -> None:
        self.agreed_s: float | None = None  # of the first process, from a boundary to the next step
        self.num_steps = 0  # taken in this session, those that were undone among them
        self.steps_s = 0.0  # and their seconds
        self._progress = progress
        self._zero: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds so far; between boundary and step the same moment for all processes."""
        if self.agreed_s is not None:
            return self.agreed_s
        if self._zero is None:
            return self._progress.elapsed_s
        return time.perf_counter() - self._zero

    def start(self) -> None:
        """Go on from where the last session stopped."""
        self._zero = time.perf_counter() - self._progress.elapsed_s

    def stop(self) -> None:
        """Stand still."""
        self._progress.elapsed_s, self._zero = self.elapsed_s, None

    def count_step(self, seconds: float) -> None:
        """A step took so long."""
        self.num_steps += 1
        self.steps_s += seconds
