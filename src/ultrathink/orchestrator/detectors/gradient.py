"""The gradient norm: explosion, slow growth and vanishing, and each layer's share of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ultrathink.orchestrator.detectors.base import Baseline, Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.remembering import PerName, Remembers
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import Window, median

EXPLOSION = (8.0, 30.0)  # times the running median: an alarm, a critical one
NOTABLE = (4.0, 8.0)  # times the median, and standard deviations
VANISHING = 1 / 20  # of the running median
IN_A_ROW = 5
LASTS = 32  # observed steps after which the new level is accepted
ENOUGH = 20  # observed steps before anything is judged
FAMILY = "grad_norm/"  # norms of layers
LAYER_FALLEN = 1 / 8  # of the layer's usual share; healthy layers stay within 20% of theirs
LAYER_IN_A_ROW = 3
LEAST = 1e-30  # keeps the logarithm of a zero gradient finite
BLOCK = 16  # observed steps per median
NUM_BLOCKS = 64
AT_ONCE = 0.5  # share of the growth within one block: then it is a jump
GROWN = 10.0  # times the lower quartile of the last blocks: growth that no single step shows


class GradientNorm(Detector):
    """Finds gradients far above or below the median of earlier ones."""

    remembered = ("baseline", "_num_high", "_num_low", "_aside")

    def __init__(self) -> None:
        self.baseline = Baseline(level=64, floor=0.05)
        self._num_high = 0
        self._num_low = 0
        self._aside: list[float] = []  # unusual values, not yet in the baseline

    def observe(self, signals: Signals) -> list[Finding]:
        norm = signals.finite("grad_norm")
        if norm is None or (norm == 0 and len(self.baseline) == 0):  # in some logs 0 means unknown
            return []
        value = math.log(max(norm, LEAST))
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
        return [Finding(signals.step, "gradient_vanishing", "medium", message, figures)]

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
            f"the gradient norm is {figures['grad_norm']:.3g}, {times:.1f} times its usual value "
            f"(median {figures['level']:.3g})"
        )
        return Finding(step, "gradient_explosion", severity, message, figures)


class GradientTrend(Detector):
    """Finds gradients that have grown tenfold or more over hundreds of steps, without a jump.

    Medians of blocks are compared with the lower quartile of the last 64 of them, which a short
    period of small gradients does not change.
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
        self._block.append(math.log(max(norm, LEAST)))
        if len(self._block) < BLOCK:
            return []
        level = median(np.array(self._block))
        self._block = []
        self._levels.add(level)
        levels = self._levels.values
        usual = float(np.quantile(levels, 0.25))
        is_grown = len(levels) >= 8 and level - usual > math.log(GROWN)
        # A jump is reported at its step, and not again while its blocks are in the window.
        is_gradual = is_grown and np.diff(levels).max() < AT_ONCE * (level - usual)
        self._num_grown = self._num_grown + 1 if is_gradual else 0
        if self._num_grown < 2:
            return []
        times = math.exp(min(level - usual, 100.0))
        message = (
            f"the gradient norm has grown to {math.exp(level):.3g}, {times:.0f} times its value "
            f"within the last {len(self._levels) * BLOCK} logged steps"
        )
        severity = "high" if times >= EXPLOSION[1] else "medium"
        figures = {"grad_norm": math.exp(level), "level": math.exp(usual), "ratio": times}
        what = (signals.step, "gradient_explosion", severity, message, figures)
        return [Finding(*what, pause=2 * BLOCK)]

    def rewind(self, step: int) -> None:
        self._block, self._num_grown = [], 0


class _Layer(Remembers):
    """The usual share of one layer, and the step since which it differs."""

    remembered = ("baseline", "num_low", "since", "last_good")

    def __init__(self) -> None:
        self.baseline = Baseline(level=64, floor=0.05)
        self.num_low = 0
        self.since = 0  # the first step that may be the cause: figures come every few steps
        self.last_good = 0


class LayerGradients(Detector):
    """Finds a layer whose share of the gradient falls to an eighth and stays there."""

    remembered = ("_layers",)

    def __init__(self) -> None:
        self._layers = PerName(_Layer)

    def observe(self, signals: Signals) -> Iterator[Finding]:
        total = signals.finite("grad_norm")
        if not total or total < 0:
            return
        for name, norm in signals.having(FAMILY).items():
            layer = self._layers[name]
            finding = self._judge(layer, name, norm, total, signals.step)
            if finding is not None:
                yield finding

    def rewind(self, step: int) -> None:
        for layer in self._layers.values():
            layer.num_low = 0
            layer.last_good = min(layer.last_good, step)
            layer.baseline.rewind(step)

    def _judge(
        self, layer: _Layer, name: str, norm: float, total: float, step: int
    ) -> Finding | None:
        value = math.log(max(norm, LEAST) / total)
        # The level is NaN after a rewind beyond all its values.
        is_low = value - layer.baseline.level <= math.log(LAYER_FALLEN)
        if len(layer.baseline) < ENOUGH or not is_low:
            layer.num_low, layer.last_good = 0, step
            layer.baseline.add(value, step)
            return None
        layer.since = layer.last_good + 1 if not layer.num_low else layer.since
        layer.num_low += 1
        if layer.num_low < LAYER_IN_A_ROW:
            return None
        usual = math.exp(layer.baseline.level)
        if layer.num_low >= LASTS:
            layer.num_low = 0
            layer.baseline = Baseline(level=64, floor=0.05)
        message = (
            f"{name} has {norm / total:.2g} of the gradient norm, usually {usual:.2g}: "
            f"it has nearly stopped learning"
        )
        figures = {"grad_norm": norm, "share": norm / total, "usual_share": usual}
        return Finding(step, "layer_vanishing", "high", message, figures, layer.since, name)
