"""The phase of a run: initialization, volatile, converging, plateau or diverging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ultrathink.orchestrator.curve import Curve
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.remembering import Remembers

INITIALIZATION = "INITIALIZATION"  # too few points
VOLATILE = "VOLATILE"  # a recent alarm about the loss or the gradient
CONVERGING = "CONVERGING"  # the loss falls
PLATEAU = "PLATEAU"  # it stays
DIVERGING = "DIVERGING"  # it rises

START = 4  # points of the curve
LOOKED_BACK = (24, 0.33)  # points, or this share of the run
CLEAR = 2.5  # standard errors
RESUMED = 4.0  # standard errors of a fall after a plateau: in many checks some occur by chance
PATIENCE = {PLATEAU: 8, DIVERGING: 2}  # points that must agree before the trend changes to that
SHAKEN = 32  # observed steps after an alarm
_UNREST = ("loss_spike", "gradient_explosion", "oscillation", "non_finite")


@dataclass(frozen=True)
class Phase:
    """A phase of a run, both steps included."""

    phase: str
    from_step: int
    to_step: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Phases(Remembers):
    """Judges each observed step by the curve so far and the latest alarms."""

    remembered = ("list", "_trend", "_next", "_since_unrest", "_since_divergence")
    records: ClassVar[Mapping[str, type]] = {"list": Phase}

    def __init__(self) -> None:
        self.list: list[Phase] = []
        self._trend = INITIALIZATION
        self._next: list[Any] = [INITIALIZATION, 0]  # a trend, and how many points showed it
        self._since_unrest = SHAKEN
        self._since_divergence = SHAKEN

    def observe(self, step: int, curve: Curve, is_new_point: bool, events: Sequence[Event]) -> None:
        self._since_unrest += 1
        self._since_divergence += 1
        for event in events:
            if event.is_alarm and event.kind in _UNREST:
                self._since_unrest = 0
            elif event.is_alarm and event.kind == "divergence":
                self._since_divergence = 0
        if is_new_point:
            self._turn(_trend(curve, RESUMED if self._trend == PLATEAU else CLEAR))
        phase = self._trend
        if self._since_divergence < SHAKEN:
            phase = DIVERGING
        elif self._since_unrest < SHAKEN:
            phase = VOLATILE
        last = self.list[-1] if self.list else None
        if last is not None and last.to_step == step and last.phase != phase:
            self.list.pop()  # if a step comes in two parts, the later one decides its phase
            if last.from_step < step:
                self.list.append(replace(last, to_step=step - 1))
        if self.list and self.list[-1].phase == phase:
            self.list[-1] = replace(self.list[-1], to_step=step)
        else:
            self.list.append(Phase(phase, step, step))

    def _turn(self, trend: str) -> None:
        other, count = self._next
        self._next = [trend, count + 1 if trend == other else 1]
        if self._next[1] >= PATIENCE.get(trend, 1) or self._trend == INITIALIZATION:
            self._trend = trend

    def rewind(self, step: int) -> None:
        kept = [phase for phase in self.list if phase.from_step <= step]
        self.list = [replace(phase, to_step=min(phase.to_step, step)) for phase in kept]
        self._since_unrest = self._since_divergence = SHAKEN


def _trend(curve: Curve, clear: float) -> str:
    """The direction of the last points: the mean of their later half less that of the earlier."""
    if len(curve) < START:
        return INITIALIZATION
    count = max(LOOKED_BACK[0], int(LOOKED_BACK[1] * len(curve)))
    levels = curve.levels[-count:]
    half = len(levels) // 2
    fall = float(levels[:half].mean() - levels[half:].mean())
    # Neighbouring points differ almost only by noise, unless the loss falls steeply.
    noise = float(np.median(np.abs(np.diff(levels)))) * 1.4826 / math.sqrt(2)
    noise = min(noise, 2 * 1.2533 * curve.spread / math.sqrt(curve.block_size))
    error = max(noise * math.sqrt(4 / len(levels)), 1e-9)
    if fall > clear * error:
        return CONVERGING
    return DIVERGING if fall < -2 * CLEAR * error and fall < -0.02 else PLATEAU
