"""The norm of the gradient, judged by its logarithm: explosion, slow growth and vanishing."""

from __future__ import annotations

import math

import numpy as np

from ultrathink.orchestrator.detectors.base import Baseline, Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import Window, median

EXPLOSION = (8.0, 30.0)  # times the running median: an alarm, a grave one
NOTABLE = (4.0, 8.0)  # times, and standard deviations
VANISHING = 1 / 20  # of the running median
IN_A_ROW = 5
LASTS = 32  # observed steps, then the new level counts
ENOUGH = 20  # observed steps before anything is judged
BLOCK = 16  # observed steps, of whose norms the median is taken
NUM_BLOCKS = 64
AT_ONCE = 0.5  # of that growth, from one block to the next
GROWN = 10.0  # times what most of the last blocks were at least: growth that no step shows


class GradientNorm(Detector):
    """Finds gradients many times as large, or as small, as the median of those before."""

    remembered = ("baseline", "_num_high", "_num_low", "_aside")

    def __init__(self) -> None:
        self.baseline = Baseline(level=64, floor=0.05)
        self._num_high = 0
        self._num_low = 0
        self._aside: list[float] = []  # unusual values, kept out of the baseline for a while

    def observe(self, signals: Signals) -> list[Finding]:
        norm = signals.finite("grad_norm")
        if norm is None or (norm == 0 and len(self.baseline) == 0):  # some logs have 0 for unknown
            return []
        value = math.log(max(norm, 1e-30))
        if len(self.baseline) < ENOUGH:
            self.baseline.add(value, signals.step)
            return []
        level = self.baseline.level
        times, score = math.exp(min(value - level, 100.0)), self.baseline.score(value)
        is_notable = times >= NOTABLE[0] and score >= NOTABLE[1]
        self._num_high = self._num_high + 1 if is_notable or times >= EXPLOSION[0] else 0
        self._num_low = self._num_low + 1 if times <= VANISHING else 0
        if not self._num_high and not self._num_low:
            self._aside = []
            self.baseline.add(value, signals.step)
            return []
        self._aside.append(value)
        if len(self._aside) >= LASTS:
            self.baseline.restart()
            for one in self._aside:
                self.baseline.add(one, signals.step)
            self._aside = []
        figures = {"grad_norm": norm, "level": math.exp(level), "ratio": times, "score": score}
        if self._num_high:
            return [self._explosion(signals.step, figures)]
        if self._num_low < IN_A_ROW:
            return []
        message = (
            f"the gradient norm has been near {norm:.3g} for {self._num_low} steps "
            f"(median {math.exp(level):.3g})"
        )
        return [Finding(signals.step, "gradient_vanishing", "medium", message, values=figures)]

    def rewind(self, step: int) -> None:
        self._num_high = self._num_low = 0
        self._aside = []
        self.baseline.rewind(step)

    def _explosion(self, step: int, figures: dict[str, float]) -> Finding:
        times, severity = figures["ratio"], "low"
        if times >= EXPLOSION[1] or (times >= EXPLOSION[0] and self._num_high >= 3):
            severity = "high"
        elif times >= EXPLOSION[0]:
            severity = "medium"
        message = (
            f"the gradient norm is {figures['grad_norm']:.3g}, {times:.1f} times what is usual "
            f"(median {figures['level']:.3g})"
        )
        return Finding(step, "gradient_explosion", severity, message, values=figures)


class GradientTrend(Detector):
    """Finds gradients that have grown tenfold and more over hundreds of steps, none of them far.

    Medians of blocks are compared with the lower quartile of the last 64 of them, which gradients
    that were small for a moment do not move.
    """

    remembered = ("_block", "_levels", "_num_grown")

    def __init__(self) -> None:
        self._block: list[float] = []
        self._levels = Window(NUM_BLOCKS)
        self._num_grown = 0

    def observe(self, signals: Signals) -> list[Finding]:
        norm = signals.finite("grad_norm")
        if norm is None or norm <= 0:
            return []
        self._block.append(math.log(max(norm, 1e-30)))
        if len(self._block) < BLOCK:
            return []
        level = median(np.array(self._block))
        self._block = []
        self._levels.add(level)
        levels = self._levels.values
        usual = float(np.quantile(levels, 0.25))
        is_grown = len(levels) >= 8 and level - usual > math.log(GROWN)
        # A jump is told at its step, and not again for as long as its blocks are remembered.
        is_gradual = is_grown and np.diff(levels).max() < AT_ONCE * (level - usual)
        self._num_grown = self._num_grown + 1 if is_gradual else 0
        if self._num_grown < 2:
            return []
        times = math.exp(min(level - usual, 100.0))
        message = (
            f"the gradient norm has grown to {math.exp(level):.3g}, {times:.0f} times what it was "
            f"at most {len(self._levels) * BLOCK} logged steps ago"
        )
        severity = "high" if times >= EXPLOSION[1] else "medium"
        figures = {"grad_norm": math.exp(level), "level": math.exp(usual), "ratio": times}
        what = (signals.step, "gradient_explosion", severity, message)
        return [Finding(*what, values=figures, pause=2 * BLOCK)]

    def rewind(self, step: int) -> None:
        self._block, self._num_grown = [], 0
