"""``decisions.jsonl``: the changes to a run, by whom and why, and their outcomes.

A decision is written again once its outcome is known; the last line of a number is valid.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ultrathink.core.files import write_atomic
from ultrathink.monitoring.jsonl import finite_number, read_lines

BY_HAND = "by_hand"
ROLLBACK = "rollback"  # the action that returns a run to an earlier step

Verdict = Literal["helped", "hurt", "unproven"]


@dataclass(frozen=True)
class Audit:
    """The effect of a decision: validation loss with it minus without it, nats per token."""

    mean: float
    low: float  # of the 95% interval
    high: float
    orders: int  # data orders that were replayed
    horizon: int  # steps after the decision at which both were scored
    differences: list[float] = field(default_factory=list)  # one for each data order

    @classmethod
    def from_json(cls, found: Any) -> Audit | None:
        """The audit in a record; None if there is no readable one."""
        if not isinstance(found, Mapping):
            return None
        numbers = [finite_number(found.get(name)) for name in ("mean", "low", "high")]
        orders, horizon = (finite_number(found.get(name)) or 0 for name in ("orders", "horizon"))
        mean, low, high = numbers
        if mean is None or low is None or high is None:
            return None
        return cls(mean, low, high, int(orders), int(horizon), list(found.get("differences") or ()))

    @property
    def verdict(self) -> Verdict:
        """``helped`` or ``hurt`` if the interval excludes zero, else ``unproven``."""
        if self.high < 0:
            return "helped"
        return "hurt" if self.low > 0 else "unproven"

    @property
    def statement(self) -> str:
        """The verdict in a sentence."""
        return {
            "helped": "It helped: the interval excludes 0.",
            "hurt": "It hurt: the interval excludes 0.",
            "unproven": "Not proven either way: the interval includes 0.",
        }[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """The audit as a JSON object, including its verdict."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass
class Decision:
    """A change to a run, by whom and why, as in ``decisions.jsonl``."""

    id: int | None  # None if no rule decided it
    step: int
    rule: str
    level: int | None  # 1 soft, 2 medium, 3 hard, 4 critical
    confidence: float | None  # 0 to 1
    signals: dict[str, Any]
    action: str
    before: Any
    after: Any
    reasoning: str
    time: float = field(default_factory=time.time)
    also: list[dict[str, Any]] = field(default_factory=list)  # further actions, before and after
    changes: list[dict[str, Any]] = field(default_factory=list)  # as applied, for audits
    outcome: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The decision as a JSON object."""
        plain = asdict(self)
        if not self.also:
            del plain["also"]
        return plain


@dataclass
class DecisionRecord(Decision):
    """A decision as in its last line; ``number`` counts the decisions of the run."""

    number: int = 0
    audit: Audit | None = None

    @classmethod
    def from_json(cls, number: int, row: Mapping[str, Any]) -> DecisionRecord:
        """The decision in a row that ``is_decision``; other invalid values are dropped."""
        level, identity = finite_number(row.get("level")), finite_number(row.get("id"))
        signals, outcome = row.get("signals"), row.get("outcome")
        return cls(
            number=number,
            step=int(row["step"]),
            rule=str(row.get("rule") or BY_HAND),
            action=row["action"],
            before=row.get("before"),
            after=row.get("after"),
            reasoning=str(row.get("reasoning") or ""),
            time=finite_number(row.get("time")) or 0.0,
            id=None if identity is None else int(identity),
            level=None if level is None else int(level),
            confidence=finite_number(row.get("confidence")),
            signals=signals if isinstance(signals, dict) else {},
            outcome=outcome if isinstance(outcome, dict) else None,
            audit=Audit.from_json(row.get("audit")),
        )

    @property
    def is_by_hand(self) -> bool:
        """Whether a person or other code requested it."""
        return self.rule == BY_HAND

    @property
    def rollback(self) -> tuple[int, int] | None:
        """The steps that it rolled back from and to; None if it is not a rollback."""
        if self.action != ROLLBACK:
            return None
        ends = finite_number(self.before), finite_number(self.after)
        return None if None in ends else (int(self.before), int(self.after))


def is_decision(row: Mapping[str, Any]) -> bool:
    """Whether an object has the step and the action of a decision."""
    return finite_number(row.get("step")) is not None and isinstance(row.get("action"), str)


def last_of_each(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of each decision, in the order of their first records."""
    found: dict[int | str, dict[str, Any]] = {}
    for place, row in enumerate(rows):
        number = row.get("id")
        found[number if isinstance(number, int) else f"place {place}"] = row
    return list(found.values())


def read_decisions(path: Path) -> list[dict[str, Any]]:
    """The last record of each decision; torn lines are skipped."""
    return last_of_each(row for _, row in read_lines(path) if row is not None)


def state_name(number: int, key: int | None = None) -> str:
    """The folder, below ``states``, of the run's state at decision ``number``, or of the snapshot
    ``key`` that it needs."""
    return f"{number:05}" if key is None else f"{number:05}-{key:05}"


def decision_of(name: str) -> int:
    """The number of the decision of a folder in ``states``."""
    return int(name.partition("-")[0])


def add_to_decision(path: Path, number: int, **values: Any) -> None:
    """Add values to the record of a decision; the run must not be training."""
    records = read_decisions(path)
    for record in records:
        if record.get("id") == number:
            record.update(values)
    _write(path, records)


def fold_decisions(path: Path) -> None:
    """Keep only the last line of each decision."""
    records = read_decisions(path)
    if records and len(records) < len(list(read_lines(path))):
        _write(path, records)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
