"""Several sinks as one; a failing sink affects neither the others nor the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ultrathink.monitoring.health import Health
from ultrathink.monitoring.records import Note, Reporter, Sink


class SinkGroup(Sink):
    """Passes every call to each of ``sinks``; an error of one is reported, and the next is called.

    A sink that failed is still called, for it may recover. Failures are reported through
    ``report``, by default to the sinks only.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        report: Reporter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members = [(sink, _health(sink, clock)) for sink in sinks]
        self._report = report if report is not None else self.message
        self._depth = 0

    def take_notes(self) -> list[Note]:
        """Nothing: notes of the sinks are reported at once."""
        return []

    def close(self) -> None:
        """Close every sink, the first last: it is usually the console, which reports the others."""
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
            # The message about a failed message may fail too: it is not reported.
            if self._depth < 2:
                notes = [*health.failed(what, error), *notes]
        else:
            notes = [*health.worked(what), *notes]
        if notes:
            self._report_all(notes)

    def _report_all(self, notes: list[Note]) -> None:
        self._depth += 1
        try:
            for text, level in notes:
                self._report(text, level)
        finally:
            self._depth -= 1


def _health(sink: Sink, clock: Callable[[], float]) -> Health:
    name = type(sink).__name__.removesuffix("Sink").lower()
    advice = "training continues, and the sink is tried again with the next record"
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
