"""Several sinks as one, of which none can take down another, or the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ultrathink.monitoring.health import Health
from ultrathink.monitoring.records import Note, Reporter, Sink


class SinkGroup(Sink):
    """Hands everything to each of ``sinks``; what one raises is reported, and the next is asked.

    Every method of a sink calls that of each one. A sink that failed is offered all that follows,
    for it may recover. ``tell`` speaks to the whole run (its sinks, its log); without it only the
    sinks hear of a failure.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        tell: Reporter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members = [(sink, _health(sink, clock)) for sink in sinks]
        self._tell = tell if tell is not None else self.message
        self._telling_depth = 0

    def take_notes(self) -> list[Note]:
        """Nothing: notes of the sinks are told as they arise."""
        return []

    def close(self) -> None:
        """Close every sink, the first last: the console, as a rule, can tell of the others."""
        while self._members:
            self._attempt(*self._members[-1], "close", lambda sink: sink.close())
            self._members.pop()

    def _each(self, what: str, action: Callable[[Sink], None]) -> None:
        for sink, health in list(self._members):
            self._attempt(sink, health, what, action)

    def _attempt(
        self, sink: Sink, health: Health, what: str, action: Callable[[Sink], None]
    ) -> None:
        notes: list[Note] = []
        try:
            try:
                action(sink)
            finally:
                notes = sink.take_notes()
        except Exception as error:
            # What fails may be the message that tells of a message that failed: it ends there.
            if self._telling_depth < 2:
                notes = [*health.failed(what, error), *notes]
        else:
            notes = [*health.worked(what), *notes]
        if notes:
            self._tell_all(notes)

    def _tell_all(self, notes: list[Note]) -> None:
        self._telling_depth += 1
        try:
            for text, level in notes:
                self._tell(text, level)
        finally:
            self._telling_depth -= 1


def _health(sink: Sink, clock: Callable[[], float]) -> Health:
    name = type(sink).__name__.removesuffix("Sink").lower()
    advice = "training goes on, and the sink is tried again with what comes next"
    return Health(f"the {name} sink", advice, clock)


def _for_each(what: str) -> Callable[..., None]:
    """A method that calls the method ``what`` of every sink."""

    def call(group: SinkGroup, *details: Any) -> None:
        group._each(what, lambda sink: getattr(sink, what)(*details))

    call.__doc__ = getattr(Sink, what).__doc__
    return call


for _what in vars(Sink):
    if not _what.startswith("_") and _what not in vars(SinkGroup):
        setattr(SinkGroup, _what, _for_each(_what))
