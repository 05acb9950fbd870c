"""What is told of something that fails, and works again, while a run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ultrathink.monitoring.records import Note

REPEAT_S = 600.0


class Health:
    """Decides which failures of ``name`` are told: each kind once, until it works again.

    A kind is the type of the exception and its errno. What fails and works by turns is told at
    most every ``REPEAT_S`` seconds.
    """

    def __init__(self, name: str, advice: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._advice = advice
        self._clock = clock
        self._failing: set[str] = set()  # what failed and did not work since
        self._told: set[tuple[str, int | None]] = set()  # kinds told since it worked last
        self._told_at: dict[tuple[str, int | None], float] = {}

    def failed(self, what: str, error: Exception) -> list[Note]:
        """What there is to tell of ``what`` (such as "write") having raised ``error``."""
        self._failing.add(what)
        kind = (type(error).__name__, getattr(error, "errno", None))
        now = self._clock()
        if kind in self._told or now - self._told_at.get(kind, -math.inf) < REPEAT_S:
            return []
        self._told.add(kind)
        self._told_at[kind] = now
        return [(f"{self._name} failed: {described(error)}; {self._advice}", "warning")]

    def worked(self, what: str) -> list[Note]:
        """What there is to tell of ``what`` having succeeded: that all works again, if it does."""
        self._failing.discard(what)
        if self._failing or not self._told:
            return []
        self._told.clear()
        return [(f"{self._name} works again", "info")]


def described(error: Exception) -> str:
    """The type and message of an error, as a line of a log names it."""
    return f"{type(error).__name__}: {error}"
