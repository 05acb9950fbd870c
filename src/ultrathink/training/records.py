"""The record of a change that took effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ultrathink.runs.decisions import BY_HAND


@dataclass(frozen=True)
class ChangeRecord:
    """What a setting was before a change and after it, and why."""

    step: int  # the change holds from the step after this one
    setting: str
    before: Any
    after: Any
    reason: str
    decision: int | None = None  # of the policy, by its number; None where somebody else asked
    rule: str = BY_HAND  # or what the trainer had to change to go on
    change: object = None  # what was applied, where it was asked for
