"""Which failures of a sink or file are reported during a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ultrathink.monitoring.records import Note

REPEAT_S = 600.0


class Health:
    """Decides which failures of ``name`` are reported: each kind once until it works again.

    A kind is the type of the exception and its errno. Alternating failures and recoveries are
    reported at most every ``REPEAT_S`` seconds.
    """

    def __init__(self, name: str, advice: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._advice = advice
        self._clock = clock
        self._failing: set[str] = set()  # operations that failed last
        self._reported: set[tuple[str, int | None]] = set()  # kinds, since it worked last
        self._reported_at: dict[tuple[str, int | None], float] = {}

    def failed(self, what: str, error: Exception) -> list[Note]:
        """Messages about the operation ``what`` (such as "write") that raised ``error``."""
        self._failing.add(what)
        kind = (type(error).__name__, getattr(error, "errno", None))
        now = self._clock()
        if kind in self._reported or now - self._reported_at.get(kind, -math.inf) < REPEAT_S:
            return []
        self._reported.add(kind)
        self._reported_at[kind] = now
        return [(f"{self._name} failed: {described(error)}; {self._advice}", "warning")]

    def worked(self, what: str) -> list[Note]:
        """Messages about the operation ``what`` that succeeded: whether all works again."""
        self._failing.discard(what)
        if self._failing or not self._reported:
            return []
        self._reported.clear()
        return [(f"{self._name} works again", "info")]


def described(error: Exception) -> str:
    """The type and message of an error."""
    return f"{type(error).__name__}: {error}"
