"""Loss scaling of fp16 training, and steps that are left out.

A dynamic loss scale is raised every so many steps until gradients overflow, then lowered: a step is
left out now and then, which is how it is meant to work. It fails where the scale keeps falling:
gradients that overflow at any scale, or that vanish once the scale is low.
"""

from __future__ import annotations

from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import Window

CALIBRATION = 64  # steps in which the scale is searched for
FALLEN = 8.0  # times below the usual scale
LOWEST = 1.0
MANY = 0.2  # of the steps


class LossScale(Detector):
    """Follows the loss scale: its search at the beginning, its falls, and underflow."""

    remembered = ("_scales", "_first_step", "_last", "_calibrated", "_is_told")

    def __init__(self) -> None:
        self._scales = Window(64)
        self._first_step: int | None = None
        self._last: float | None = None
        self._calibrated = False
        self._is_told = False  # that the scale is tried too high now and then

    def observe(self, signals: Signals) -> list[Finding]:
        scale = signals.finite("loss_scale")
        if scale is None or scale <= 0:
            return []
        step, before, self._last = signals.step, self._last, scale
        if self._first_step is None:
            self._first_step = step
        self._scales.add(scale)
        if before is None:
            return []
        figures = {"loss_scale": scale, "before": before}
        if not self._calibrated and step - self._first_step >= CALIBRATION:
            self._calibrated = True
        if scale <= LOWEST < before:
            message = (
                f"the fp16 loss scale has fallen to {scale:g}: small gradients become zero; "
                f"bf16 has no such scale"
            )
            return [Finding(step, "fp16_underflow", "high", message, values=figures)]
        if scale >= before:
            return []
        text = f"fp16 gradients overflowed: the loss scale went from {before:g} to {scale:g}"
        severity = "info"
        if not self._calibrated:
            text += " (its first search)"
        elif scale * FALLEN <= self._scales.median():
            severity = "medium"
            text += f", far below the usual {self._scales.median():g}"
        elif self._is_told:
            return []
        else:
            self._is_told = True
            text += "; a dynamic scale is tried too high now and then, which is not told again"
        return [Finding(step, "fp16_overflow", severity, text, values=figures)]

    def rewind(self, step: int) -> None:
        self._last = None


class SkippedSteps(Detector):
    """Finds stretches in which many steps are left out; single ones are told as information."""

    remembered = ("_steps", "_counts", "_first_step")

    def __init__(self) -> None:
        self._steps = Window(9)
        self._counts = Window(9)
        self._first_step: int | None = None

    def observe(self, signals: Signals) -> list[Finding]:
        count = signals.finite("skipped_steps")
        if count is None:
            return []
        if self._first_step is None:
            self._first_step = signals.step
        before = float(self._counts.values[-1]) if len(self._counts) else count
        if count < before:  # counted anew, as after a restart
            self.rewind(signals.step)
            before = count
        self._steps.add(float(signals.step))
        self._counts.add(count)
        if count == before:
            return []
        num_steps = max(1.0, float(self._steps.values[-1] - self._steps.values[0]))
        num_skipped = float(self._counts.values[-1] - self._counts.values[0])
        share = min(1.0, num_skipped / num_steps)
        is_early = signals.step - self._first_step < CALIBRATION
        severity = "info"
        if num_skipped >= 3 and share > MANY and not is_early:
            severity = "high" if share > 0.5 else "medium"
        scale = signals.finite("loss_scale")
        if scale is not None and scale <= LOWEST and severity == "info":
            severity = "medium"  # no scale was too high: the gradients were not finite
        elif scale is not None and severity == "info":
            return []  # the scale was tried too high, which LossScale reports
        message = f"{num_skipped:.0f} of the last {num_steps:.0f} steps were left out"
        figures = {"skipped": num_skipped, "steps": num_steps}
        return [Finding(signals.step, "skipped_steps", severity, message, values=figures)]

    def rewind(self, step: int) -> None:
        self._steps.clear()
        self._counts.clear()
