"""The record of a change that took effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ultrathink.runs.decisions import BY_HAND


@dataclass(frozen=True)
class ChangeRecord:
    """A setting before and after a change, and the reason."""

    step: int  # the change applies from the next step on
    setting: str
    before: Any
    after: Any
    reason: str
    decision: int | None = None  # number of the policy's decision; None for other requests
    rule: str = BY_HAND  # or the reason why the trainer itself changed it
    change: object = None  # the requested change
