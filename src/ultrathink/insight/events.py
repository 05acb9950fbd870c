"""The events that detectors reported during training, from ``events.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ultrathink.monitoring.jsonl import finite_number
from ultrathink.orchestrator.events import SEVERITIES, Event
from ultrathink.runs.reading import RunReader, has_step


def read_events(reader: RunReader) -> list[Event]:
    """The events in the order of their steps.

    An event whose severity rose has several lines; the last one counts.
    """
    found: dict[tuple[Any, ...], Event] = {}
    for row in reader.rows(reader.run.events, _is_event):
        event = _event(row)
        found[event.kind, event.subject, event.step] = event
    return sorted(found.values(), key=lambda event: (event.step, event.kind))


def most_severe(events: Sequence[Event], most: int) -> list[Event]:
    """The ``most`` most severe events, in their order."""
    places = sorted(range(len(events)), key=lambda n: -SEVERITIES.index(events[n].severity))
    return [events[place] for place in sorted(places[:most])]


def _is_event(row: Mapping[str, Any]) -> bool:
    began = finite_number(row.get("began", row.get("step")))
    return has_step(row) and began is not None and row.get("severity") in SEVERITIES


def _event(row: Mapping[str, Any]) -> Event:
    found_at, began = int(row["step"]), int(row.get("began", row["step"]))
    end = finite_number(row.get("to_step"))
    return Event(
        step=began,
        kind=str(row.get("kind")),
        severity=str(row["severity"]),
        message=str(row.get("message") or ""),
        to_step=max(began, found_at if end is None else int(end)),
        found_at=found_at,
        subject=str(row.get("subject") or ""),
    )
