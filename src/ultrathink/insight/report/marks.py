"""Marks on the loss curve: phases as bands, decisions as numbered marks, alarms below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ultrathink.insight.report.charts import Span
from ultrathink.orchestrator.curve import FIRST_BLOCK
from ultrathink.orchestrator.events import SEVERITIES, Event
from ultrathink.orchestrator.phases import (
    CONVERGING,
    DIVERGING,
    INITIALIZATION,
    PLATEAU,
    SHAKEN,
    START,
    VOLATILE,
    Phase,
)
from ultrathink.runs.decisions import DecisionRecord

STEPS_TO_JUDGE = START * FIRST_BLOCK  # logged steps before the first trend
PHASES = {
    INITIALIZATION: f"the first {STEPS_TO_JUDGE} logged steps",
    VOLATILE: f"{SHAKEN} logged steps after an alarm",
    CONVERGING: "the loss falls",
    PLATEAU: "the loss stays level",
    DIVERGING: "the loss rises",
}
LEVELS = {1: "soft", 2: "medium", 3: "hard", 4: "critical"}
_MAX_MARKS = 150  # of events, next to each other
_MAX_LANES = 4
_NUMBER_SHARE = 0.07  # of the width that a number takes on a phone
_LETTER_SHARE = 0.0068  # and a letter of its name on a wide screen
_TO_THE_LEFT = 0.8  # of the width: marks beyond it stand to the left of their lines
_FEW = 12  # decisions whose names are written out
MANY = 24  # decisions above which several share a mark, and their lines are faint
_MANY_SHARE = 0.17  # of the width that such a mark takes on a phone


def bands(phases: Sequence[Phase], span: Span) -> Iterator[tuple[str, float, float]]:
    """Each phase with its left edge and its width, as shares; they touch each other."""
    for number, phase in enumerate(phases):
        end = float(phase.to_step)
        if number + 1 < len(phases):
            end = max(end, float(phases[number + 1].from_step))
        left = span.share(phase.from_step)
        yield phase.phase, left, max(0.001, span.share(end) - left)


@dataclass(frozen=True)
class Badge:
    """A mark above the plot, of one decision or of several close to each other."""

    share: float
    lane: int
    decisions: list[DecisionRecord]
    is_named: bool

    @property
    def is_left(self) -> bool:
        """Whether it stands to the left of its line."""
        return self.share > _TO_THE_LEFT


def badges(decisions: Sequence[DecisionRecord], span: Span) -> list[Badge]:
    """Each decision in the first lane with room; where no lane has, it joins the mark before."""
    is_named = len(decisions) <= _FEW
    ends: list[float] = []
    placed: list[Badge] = []
    for decision in sorted(decisions, key=lambda one: one.step):
        share = span.share(decision.step)
        name = _LETTER_SHARE * (len(decision.action) + 5) if is_named else 0.0
        room = max(_NUMBER_SHARE if len(decisions) <= MANY else _MANY_SHARE, name)
        begin = share - room if share > _TO_THE_LEFT else share
        free = next((lane for lane, end in enumerate(ends) if end <= begin), len(ends))
        if free == _MAX_LANES:
            placed[-1].decisions.append(decision)
            continue
        if free == len(ends):
            ends.append(0.0)
        ends[free] = begin + room
        placed.append(Badge(share, free, [decision], is_named))
    return placed


def rail(events: Sequence[Event], span: Span) -> list[tuple[Event, int]]:
    """The most severe of the events in one place, and the number of the others there."""
    nearby: dict[int, list[Event]] = {}
    for event in events:
        nearby.setdefault(int(span.share(event.step) * _MAX_MARKS), []).append(event)
    return [
        (max(there, key=lambda event: SEVERITIES.index(event.severity)), len(there) - 1)
        for there in nearby.values()
    ]


def severities(events: Sequence[Event]) -> list[tuple[str, int]]:
    """The number of events of each severity, the most severe first."""
    counts = [(s, sum(event.severity == s for event in events)) for s in reversed(SEVERITIES)]
    return [(severity, count) for severity, count in counts if count]
