"""Several sinks as one, of which none can take down another, or the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ultrathink.monitoring.health import Health
from ultrathink.monitoring.records import Level, MetricRecord, Note, RunInfo, Sink, Tell

if TYPE_CHECKING:
    from ultrathink.monitoring.experts import ExpertRecord


class SinkGroup(Sink):
    """Hands everything to each of ``sinks``; what one raises is told, and the next gets its turn.

    A sink that failed is offered all that follows, for it may recover. ``tell`` speaks to the
    whole run (its sinks, its log); without it only the sinks hear of a failure.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        tell: Tell | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members = [(sink, _health(sink, clock)) for sink in sinks]
        self._tell = tell if tell is not None else self.message
        self._telling_depth = 0

    def open(self, info: RunInfo) -> None:
        """Open every sink."""
        self._each("open", lambda sink: sink.open(info))

    def set_total_steps(self, total_steps: int) -> None:
        """Tell every sink the run's length."""
        self._each("set_total_steps", lambda sink: sink.set_total_steps(total_steps))

    def progress(self, step: int) -> None:
        """Tell every sink of a finished step."""
        self._each("progress", lambda sink: sink.progress(step))

    def write(self, record: MetricRecord) -> None:
        """Hand a record to every sink."""
        self._each("write", lambda sink: sink.write(record))

    def experts(self, record: ExpertRecord) -> None:
        """Hand what experts did to every sink."""
        self._each("experts", lambda sink: sink.experts(record))

    def message(self, text: str, level: Level) -> None:
        """Hand a message to every sink."""
        self._each("message", lambda sink: sink.message(text, level))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Hand a sample to every sink."""
        self._each("sample", lambda sink: sink.sample(step, prompt, text))

    def phase(self, name: str) -> None:
        """Tell every sink of another phase."""
        self._each("phase", lambda sink: sink.phase(name))

    def decision(self, step: int, title: str, text: str) -> None:
        """Hand a decision to every sink."""
        self._each("decision", lambda sink: sink.decision(step, title, text))

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
