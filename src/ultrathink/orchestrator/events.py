"""Findings of detectors, and how findings at consecutive steps become one event."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from ultrathink.orchestrator.remembering import Remembers

SEVERITIES = ("info", "low", "medium", "high", "critical")
ALARM = SEVERITIES.index("medium")  # from this severity on, a person should look


@dataclass(frozen=True)
class Finding:
    """A detector's finding at one step.

    ``since`` is the step at which the problem began, if it was found later; ``subject`` is the
    source or the group of experts concerned. ``pause`` is the largest number of observed steps
    until the next finding of the same incident: a detector that judges blocks of steps does not
    report at every step. Only finite ``values`` are kept.
    """

    step: int
    kind: str
    severity: str
    message: str
    values: dict[str, float] = field(default_factory=dict)  # the figures behind it
    since: int | None = None
    subject: str = ""
    pause: int = 8

    def __post_init__(self) -> None:
        assert self.severity in SEVERITIES, self.severity
        finite = {name: float(x) for name, x in self.values.items() if math.isfinite(x)}
        object.__setattr__(self, "values", finite)


@dataclass(frozen=True)
class Event:
    """One incident, from ``step`` to ``to_step``, described by its most severe finding."""

    step: int
    kind: str
    severity: str
    message: str
    to_step: int
    found_at: int  # the step at which it was first found
    subject: str = ""
    values: dict[str, float] = field(default_factory=dict)

    @property
    def is_alarm(self) -> bool:
        """Whether a person should look: ``medium`` or above."""
        return is_alarm(self.severity)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_alarm(severity: str) -> bool:
    """Whether a person should look: ``medium`` or above."""
    return SEVERITIES.index(severity) >= ALARM


@dataclass(frozen=True)
class _Open:
    number: int  # of the event
    until: int  # count of observed steps: later findings are another incident


class Incidents(Remembers):
    """Joins findings of one kind and subject into events, if the pauses between them are short."""

    remembered = ("events", "_open", "_count")
    records: ClassVar[Mapping[str, type]] = {"events": Event, "_open": _Open}

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._open: dict[str, _Open] = {}  # the last event of each kind/subject
        self._count = 0  # observed steps

    def add(self, findings: Iterable[Finding]) -> list[Event]:
        """Add the findings of an observed step; returns events that are new or more severe."""
        self._count += 1
        changed = []
        for finding in findings:
            last = self._open.get(_key(finding))
            if last is not None and self._count <= last.until:
                number, before = last.number, self.events[last.number]
                self.events[number] = event = _joined(before, finding)
                is_graver = event.severity != before.severity
            else:
                number, is_graver = len(self.events), True
                event = _begun(finding, self.events[last.number] if last is not None else None)
                self.events.append(event)
            self._open[_key(finding)] = _Open(number, self._count + finding.pause)
            if is_graver:
                changed.append(event)
        return changed

    def close(self) -> None:
        """End all incidents, as after steps were undone."""
        self._open.clear()

    def current(self, findings: Iterable[Finding]) -> list[Event]:
        """The events of the ``findings`` of the last observed step."""
        keys = dict.fromkeys(_key(finding) for finding in findings)
        return [self.events[self._open[key].number] for key in keys]


def _key(finding: Finding) -> str:
    return f"{finding.kind}/{finding.subject}"


def _begun(finding: Finding, before: Event | None) -> Event:
    begin = finding.step if finding.since is None else min(finding.since, finding.step)
    if before is not None:  # steps that were reported already do not count again
        begin = min(max(begin, before.to_step + 1), finding.step)
    return Event(
        begin,
        finding.kind,
        finding.severity,
        finding.message,
        to_step=finding.step,
        found_at=finding.step,
        subject=finding.subject,
        values=finding.values,
    )


def _joined(event: Event, finding: Finding) -> Event:
    """The event with one more finding; it is described by the first of the most severe ones."""
    longer = replace(event, to_step=finding.step)
    if SEVERITIES.index(finding.severity) <= SEVERITIES.index(event.severity):
        return longer
    return replace(
        longer, severity=finding.severity, message=finding.message, values=finding.values
    )


def in_order(events: Sequence[Event]) -> list[Event]:
    """Events ordered by their first steps."""
    return sorted(events, key=lambda event: (event.step, event.kind))
