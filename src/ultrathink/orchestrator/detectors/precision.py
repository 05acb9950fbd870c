"""Loss scaling of fp16 training, and skipped steps.

A dynamic loss scale is raised periodically until gradients overflow, then lowered: skipping a step
now and then is normal. It fails if the scale keeps falling, because gradients overflow at any scale
or underflow once the scale is low.
"""

from __future__ import annotations

from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import Window

CALIBRATION = 64  # first steps, in which the scale is searched
FALLEN = 8.0  # factor below the usual scale
LOWEST = 1.0
MANY = 0.2  # of the steps


class LossScale(Detector):
    """Follows the loss scale: the initial search, its falls, and underflow."""

    remembered = ("_scales", "_first_step", "_last", "_calibrated", "_is_reported")

    def __init__(self) -> None:
        self._scales = Window(64)
        self._first_step: int | None = None
        self._last: float | None = None
        self._calibrated = False
        self._is_reported = False  # that occasional overflows are normal

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
                f"bf16 needs no loss scale"
            )
            return [Finding(step, "fp16_underflow", "high", message, figures)]
        if scale >= before:
            return []
        text = f"fp16 gradients overflowed: the loss scale went from {before:g} to {scale:g}"
        severity = "info"
        if not self._calibrated:
            text += " (initial search)"
        elif scale * FALLEN <= self._scales.median():
            severity = "medium"
            text += f", far below the usual {self._scales.median():g}"
        elif self._is_reported:
            return []
        else:
            self._is_reported = True
            text += "; occasional overflows of a dynamic scale are normal and not reported again"
        return [Finding(step, "fp16_overflow", severity, text, figures)]

    def rewind(self, step: int) -> None:
        self._last = None


class SkippedSteps(Detector):
    """Finds periods in which many steps are skipped; single ones are reported as information."""

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
        if count < before:  # the count was reset, as after a restart
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
        message = f"{num_skipped:.0f} of the last {num_steps:.0f} steps were skipped"
        figures = {"skipped": num_skipped, "steps": num_steps}
        return [Finding(signals.step, "skipped_steps", severity, message, figures)]

    def rewind(self, step: int) -> None:
        self._steps.clear()
        self._counts.clear()
