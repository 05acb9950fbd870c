"""The trend of the training loss, plateaus and oscillation, and faults of the learning rate."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import SMALL, Signals
from ultrathink.orchestrator.windows import Window, deviation, median

Floats = npt.NDArray[np.float64]

SPAN = 32  # observed steps per mean
FIRST_FALL = 32  # first observed steps, whose fall predicts nothing
STALLED = 0.1  # of the fall predicted by the earlier spans
SURE = 6.0  # standard errors of that prediction
LEAST = 0.005  # in the logarithm: smaller falls may be rounding in the log
AT_ONCE = 0.7  # share of a fall within a quarter of its steps
RATE_CUT = 0.5  # a learning rate lowered this much explains slower learning
OFF = math.log(1.05)  # learning rate over the scheduled one
FAR_OFF = math.log(2.0)
RATE_LOST = 20.0  # times lower in one step: steps of a schedule are smaller
STAYS = 16  # observed steps
SWING = 3.0  # times the usual spread
REGULAR = 0.5  # autocorrelation of the loss after half a period and a period


class Plateau(Detector):
    """Finds a loss that fell clearly and then stopped falling.

    Of three consecutive spans of steps, the fall from the first to the second predicts one at least
    half as large from the second to the third (falls shrink slowly). If that prediction is certain
    and almost no fall follows, learning has stalled. A sudden fall, as at the end of an epoch or
    when the learning rate is lowered, predicts nothing; nor does the first fall of a run, in which
    the model learns the frequencies of tokens.
    """

    remembered = ("_losses", "_rates", "_num_steps")

    def __init__(self) -> None:
        self._losses = Window(3 * SPAN)
        self._rates = Window(3 * SPAN)
        self._num_steps = 0

    def observe(self, signals: Signals) -> list[Finding]:
        loss = signals.finite("loss")
        if loss is None or loss <= 0:
            return []
        self._losses.add(math.log(loss + SMALL))
        rate = signals.finite("lr")
        if rate is not None:
            self._rates.add(rate)
        self._num_steps += 1
        if self._num_steps < FIRST_FALL + 3 * SPAN or self._num_steps % (SPAN // 4):
            return []
        if len(self._losses) < 3 * SPAN:
            return []
        losses = self._losses.values
        first, second, third = (_without_outliers(part) for part in np.split(losses, 3))
        error = float(second.std()) * math.sqrt(2 / SPAN)
        fell, fallen = float(first.mean() - second.mean()), float(second.mean() - third.mean())
        promised = 0.5 * fell
        if promised < max(SURE * error, LEAST) or fallen > STALLED * promised or fallen < -promised:
            return []
        if _is_a_step(losses[: 2 * SPAN]):
            return []
        more = "; the learning rate has been lowered meanwhile" if self._is_lowered() else ""
        message = (
            f"the loss fell {-math.expm1(-fell):.1%} over {SPAN} logged steps and then "
            f"{-math.expm1(-max(fallen, 0.0)):.1%} over as many{more}"
        )
        figures = {"loss": loss, "fell": fell, "fallen": fallen, "error": error}
        return [Finding(signals.step, "plateau", "medium", message, figures, pause=SPAN)]

    def rewind(self, step: int) -> None:
        self._losses.clear()
        self._rates.clear()

    def _is_lowered(self) -> bool:
        rates = self._rates.values
        return len(rates) == 3 * SPAN and bool(
            np.median(rates[-SPAN:]) < RATE_CUT * np.median(rates[:SPAN])
        )


class RateLoss(Detector):
    """Finds a learning rate that drops to almost zero in one step, and stays there."""

    remembered = ("_last", "_before", "_begin", "_count")

    def __init__(self) -> None:
        self._last: float | None = None
        self._before = 0.0  # the rate from which it fell
        self._begin = 0
        self._count = 0

    def observe(self, signals: Signals) -> list[Finding]:
        rate = signals.finite("lr")
        if rate is None or rate < 0:
            return []
        last, self._last = self._last, rate
        if self._count and 0 < rate * RATE_LOST <= self._before:
            self._count += 1
        elif last is not None and 0 < rate * RATE_LOST <= last:
            self._before, self._begin, self._count = last, signals.step, 1
        else:
            self._count = 0
        if self._count != STAYS:
            return []
        message = (
            f"the learning rate fell in one step from {self._before:.3g} to {rate:.3g}, "
            f"which nearly stops learning"
        )
        figures = {"lr": rate, "before": self._before}
        return [Finding(signals.step, "plateau", "medium", message, figures, self._begin)]

    def rewind(self, step: int) -> None:
        self._last, self._count = None, 0


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
        return [Finding(signals.step, "lr_off_schedule", severity, message, figures)]


class Oscillation(Detector):
    """Finds a loss that oscillates regularly, and far more than it used to vary.

    Over the last 64 steps, without the trend: a robust spread several times that of earlier spans,
    and an autocorrelation that is strongly negative at some lag and positive at twice that lag.
    """

    remembered = ("_losses", "_spreads", "_num_steps")

    def __init__(self) -> None:
        self._losses = Window(2 * SPAN)
        self._spreads = Window(16)
        self._num_steps = 0

    def observe(self, signals: Signals) -> list[Finding]:
        loss = signals.finite("loss")
        if loss is None or loss <= 0:
            return []
        self._losses.add(math.log(loss + SMALL))
        self._num_steps += 1
        if len(self._losses) < 2 * SPAN or self._num_steps % (SPAN // 2):
            return []
        values = self._losses.values
        steps = np.arange(len(values), dtype=np.float64)
        flat = values - np.polyval(np.polyfit(steps, values, 1), steps)
        spread, usual = deviation(flat), self._spreads.median()
        if len(self._spreads) >= 4 and spread > max(SWING * usual, LEAST):
            lag = regular_lag(flat)
            if lag is not None:
                message = (
                    f"the loss oscillates with a period of about {2 * lag} logged steps, "
                    f"{spread / usual:.1f} times its usual variation"
                )
                figures = {"spread": spread, "usual": usual, "period": 2.0 * lag}
                what = (signals.step, "oscillation", "medium", message, figures)
                return [Finding(*what, pause=SPAN)]
            return []
        self._spreads.add(spread)
        return []

    def rewind(self, step: int) -> None:
        self._losses.clear()


def _without_outliers(values: Floats) -> Floats:
    kept: Floats = values[np.abs(values - median(values)) <= max(4 * deviation(values), LEAST)]
    return kept


def _is_a_step(values: Floats) -> bool:
    """Whether most of a fall is sudden: between neighbouring eighths of its steps."""
    eighths = np.median(values.reshape(8, -1), axis=1)
    fall = eighths[0] - eighths[-1]
    return bool((eighths[:-2] - eighths[2:]).max() > AT_ONCE * fall)


def regular_lag(values: Floats) -> int | None:
    """Half the period of a regular oscillation, in steps; None if there is none."""
    limit = 4 * deviation(values)
    clipped = np.clip(values - median(values), -limit, limit)
    power = float(clipped @ clipped)
    if power == 0:
        return None
    for lag in range(1, len(values) // 4 + 1):
        half = float(clipped[lag:] @ clipped[:-lag]) / power
        whole = float(clipped[2 * lag :] @ clipped[: -2 * lag]) / power
        if half < -REGULAR and whole > REGULAR:
            return lag
    return None
