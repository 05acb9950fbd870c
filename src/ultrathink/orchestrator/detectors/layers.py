"""Each layer's share of the gradient: a layer that stops learning while the others continue."""

from __future__ import annotations

import math

from ultrathink.orchestrator.detectors.base import Baseline, Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.remembering import PerName, Remembers
from ultrathink.orchestrator.signals import Signals

FAMILY = "grad_norm/"
FALLEN = 1 / 8  # of the layer's usual share; healthy layers stay within 20% of theirs
IN_A_ROW = 3
ENOUGH = 20  # observed steps before anything is judged
LASTS = 32  # observed steps after which the new share is accepted
LEAST = 1e-30  # keeps the logarithm of a zero gradient finite


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

    def observe(self, signals: Signals) -> list[Finding]:
        total = signals.finite("grad_norm")
        if not total or total < 0:
            return []
        findings = []
        for name, norm in signals.having(FAMILY).items():
            layer = self._layers[name]
            finding = self._judge(layer, name, norm, total, signals.step)
            findings += [finding] if finding is not None else []
        return findings

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
        is_low = value - layer.baseline.level <= math.log(FALLEN)
        if len(layer.baseline) < ENOUGH or not is_low:
            layer.num_low, layer.last_good = 0, step
            layer.baseline.add(value, step)
            return None
        layer.since = layer.last_good + 1 if not layer.num_low else layer.since
        layer.num_low += 1
        if layer.num_low < IN_A_ROW:
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
        return Finding(
            step, "layer_vanishing", "high", message, layer.since, subject=name, values=figures
        )
