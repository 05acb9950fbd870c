"""Proposals of the rules, their confidence, and their text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ultrathink.runs.decisions import ROLLBACK, Decision
from ultrathink.training.change import Change
from ultrathink.training.changes import ReviveExperts

SOFT, MEDIUM, HARD, CRITICAL = 1, 2, 3, 4
LEVELS = {SOFT: "soft", MEDIUM: "medium", HARD: "hard", CRITICAL: "critical"}
SKIP_BATCH = "skip_batch"  # the action of the guard, which is not a change of the run
SURE_ENOUGH = {SOFT: 0.7, MEDIUM: 0.8, HARD: 0.9, CRITICAL: 0.0}  # the smallest confidence


@dataclass(frozen=True)
class Proposal:
    """What a rule would do at this step, and why.

    ``began`` is the first step of the problem. After ``judged_after`` steps held-out text decides
    whether it helped (``SafetyNet``); None: it is an exact repair, or its rule judges it.
    """

    rule: str
    level: int
    confidence: float  # 0 to 1
    changes: tuple[Change, ...]
    reasoning: str
    signals: Mapping[str, float] = field(default_factory=dict)
    began: int | None = None
    judged_after: int | None = None

    @property
    def is_sure_enough(self) -> bool:
        return self.confidence >= SURE_ENOUGH[self.level]


def line_of(decision: Decision) -> str:
    """A decision of the policy as a line for the console."""
    assert decision.level is not None
    did = f"{decision.action}: {_short(decision.before)} -> {_short(decision.after)}"
    if decision.action == SKIP_BATCH:
        did = "skipped the update"
    elif decision.action == ROLLBACK:
        did = f"went back to step {decision.after:,}"
    elif decision.action == ReviveExperts.name and decision.after is not None:
        did = f"restarted {len(decision.after)} expert{'s' * (len(decision.after) != 1)}"
    for more in decision.also:
        did += f", {more['action']}: {_short(more['before'])} -> {_short(more['after'])}"
    return (
        f"step {decision.step:,}, {decision.rule} ({LEVELS[decision.level]}, "
        f"{decision.confidence:.0%}): {did}. {decision.reasoning}"
    )


def confidence_of(score: float) -> float:
    """The confidence that a value this many standard deviations out is not an accident.

    In any distribution at most 1 / (1 + k²) of the values are k deviations or more above the mean
    (Cantelli's inequality).
    """
    return 1 - 1 / (1 + max(0.0, score) ** 2)


def confidence_after(count: int) -> float:
    """The confidence that something seen ``count`` times in a row will occur again:
    (n + 1) / (n + 2), Laplace's rule of succession."""
    return (count + 1) / (count + 2)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
