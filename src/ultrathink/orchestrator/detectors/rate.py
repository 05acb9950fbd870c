"""Compares the learning rate that the optimizer used with the scheduled one."""

from __future__ import annotations

import math

from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import Signals

OFF = math.log(1.05)
FAR_OFF = math.log(2.0)


class OffSchedule(Detector):
    """Finds a rate that differs from the scheduled one: a fault of the schedule or the optimizer.

    Only our own runs log both (``lr``, ``lr_scheduled``).
    """

    remembered = ()

    def observe(self, signals: Signals) -> list[Finding]:
        rate, scheduled = signals.finite("lr"), signals.finite("lr_scheduled")
        if not rate or not scheduled or rate < 0 or scheduled < 0:
            return []
        off = math.log(rate / scheduled)
        if abs(off) < OFF:
            return []
        severity = "high" if abs(off) >= FAR_OFF else "medium"
        message = (
            f"the learning rate is {rate:.3g}, {rate / scheduled:.3g} times the scheduled rate "
            f"({scheduled:.3g})"
        )
        figures = {"lr": rate, "lr_scheduled": scheduled, "ratio": rate / scheduled}
        return [Finding(signals.step, "lr_off_schedule", severity, message, values=figures)]

    def rewind(self, step: int) -> None:
        pass
