"""What a run's ``decisions.jsonl`` and ``events.jsonl`` hold, read line by line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrathink.orchestrator.events import SEVERITIES, Event

BY_HAND = "by_hand"


@dataclass(frozen=True)
class Audit:
    """What a replay found: the validation loss with a decision less that without it, in nats."""

    mean: float
    low: float  # of the 95% interval
    high: float
    orders: int | None = None  # of the data, that were replayed
    horizon: int | None = None  # steps

    @property
    def verdict(self) -> str:
        """``helped``, ``hurt`` where the interval excludes zero, else ``unproven``."""
        if self.high < 0:
            return "helped"
        return "hurt" if self.low > 0 else "unproven"

    @property
    def statement(self) -> str:
        """The verdict in a sentence."""
        return {
            "helped": "It helped: the interval excludes 0.",
            "hurt": "It did harm: the interval excludes 0.",
            "unproven": "Not proven either way: the interval includes 0.",
        }[self.verdict]


@dataclass(frozen=True)
class Decision:
    """One change of a run: who made it, why, and what came of it; ``number`` counts from 1."""

    number: int
    step: int
    rule: str
    action: str
    before: Any
    after: Any
    reasoning: str
    id: int | None = None
    level: int | None = None  # 1 soft, 2 medium, 3 hard, 4 critical
    confidence: float | None = None
    signals: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] | None = None
    audit: Audit | None = None

    @property
    def is_by_hand(self) -> bool:
        """Whether a person or other code asked for it."""
        return self.rule == BY_HAND


def read_decisions(path: Path) -> tuple[list[Decision], int]:
    """The decisions in order, and how many lines are damaged and left out.

    A later line about the same decision takes the place of the earlier one.
    """
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    num_damaged = 0
    for number, row in enumerate(json_rows(path)):
        if row is None or not _is_decision(row):
            num_damaged += 1
            continue
        is_named = row.get("id") is not None
        key = (row["id"], row["step"], row.get("action")) if is_named else (number,)
        found[key] = row
    return [_decision(place, row) for place, row in enumerate(found.values(), 1)], num_damaged


def _is_decision(row: Mapping[str, Any]) -> bool:
    # Runs of before had `setting` and `reason`.
    action = row.get("action", row.get("setting"))
    return number_of(row.get("step")) is not None and isinstance(action, str)


def _decision(number: int, row: Mapping[str, Any]) -> Decision:
    level, identity = number_of(row.get("level")), number_of(row.get("id"))
    signals, outcome = row.get("signals"), row.get("outcome")
    return Decision(
        number=number,
        step=int(row["step"]),
        rule=str(row.get("rule") or BY_HAND),
        action=str(row.get("action", row.get("setting"))),
        before=row.get("before"),
        after=row.get("after"),
        reasoning=str(row.get("reasoning", row.get("reason")) or ""),
        id=None if identity is None else int(identity),
        level=None if level is None else int(level),
        confidence=number_of(row.get("confidence")),
        signals=signals if isinstance(signals, dict) else {},
        outcome=outcome if isinstance(outcome, dict) else None,
        audit=_audit(row.get("audit")),
    )


def _audit(found: Any) -> Audit | None:
    if not isinstance(found, dict):
        return None
    mean, low, high = (number_of(found.get(name)) for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return None
    orders, horizon = (number_of(found.get(name)) for name in ("orders", "horizon"))
    return Audit(
        mean,
        low,
        high,
        None if orders is None else int(orders),
        None if horizon is None else int(horizon),
    )


def read_events(path: Path) -> tuple[list[Event], int]:
    """The events that a run told as it trained, and how many lines are damaged and left out.

    Of an event that grew graver, which has a line for each time, the last is taken.
    """
    found: dict[tuple[Any, ...], Event] = {}
    num_damaged = 0
    for row in json_rows(path):
        event = _event(row) if row is not None else None
        if event is None:
            num_damaged += 1
            continue
        found[event.kind, event.subject, event.step] = event
    events = sorted(found.values(), key=lambda event: (event.step, event.kind))
    return events, num_damaged


def _event(row: Mapping[str, Any]) -> Event | None:
    told, began = number_of(row.get("step")), number_of(row.get("began", row.get("step")))
    if told is None or began is None or row.get("severity") not in SEVERITIES:
        return None
    end = number_of(row.get("to_step"))
    return Event(
        step=int(began),
        kind=str(row.get("kind")),
        severity=str(row["severity"]),
        message=str(row.get("message") or ""),
        to_step=max(int(began), int(told if end is None else end)),
        found_at=int(told),
        subject=str(row.get("subject") or ""),
    )


def json_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object on each line of a file; None for a line that holds none. No file, no lines."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else None


def number_of(value: Any) -> float | None:
    """``value`` where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None
