"""Depth routing: layers that get too few tokens or weigh them with nothing, choices that do not
look at tokens, and predictors that do not know them.

The figures are those of each layer in ``metrics.jsonl``, ``depth/<layer>/<figure>``
(docs/elastic.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ultrathink.monitoring.depth import of_layers
from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import Signals

IN_A_ROW = 5  # logged steps
SETTLED = 200  # steps of the run; before, a router and its predictor are still learning
STARVED = 0.5  # of the capacity: evaluation gives a layer that share of the tokens it trained on
IDLE = 0.1  # gates of chosen tokens: what the layer computes is nearly lost
FROZEN = 0.95  # share of positions that are always or never chosen
UNSKILLED = 0.3  # agreement above chance, as a share of what there is above it


class Depth(Detector):
    """Judges the figures of every layer; a finding must last for some logged steps."""

    remembered = ("_lasting",)

    def __init__(self) -> None:
        self._lasting: dict[str, int] = {}  # kind/layer -> logged steps

    def observe(self, signals: Signals) -> Iterator[Finding]:
        if signals.step < SETTLED:
            return
        for layer, figures in of_layers(signals.having("depth/")).items():
            found = self._judge(layer, figures)
            for key in [key for key in self._lasting if key.endswith(f"/{layer}")]:
                if key.partition("/")[0] not in found:
                    del self._lasting[key]
            for kind, text in found.items():
                count = self._lasting[f"{kind}/{layer}"] = (
                    self._lasting.get(f"{kind}/{layer}", 0) + 1
                )
                if count >= IN_A_ROW:
                    yield Finding(
                        signals.step, kind, "medium", text, dict(figures), subject=f"layer {layer}"
                    )

    def rewind(self, step: int) -> None:
        self._lasting.clear()

    def _judge(self, layer: str, figures: Mapping[str, float]) -> dict[str, str]:
        """What is wrong with a layer, by kind."""
        found: dict[str, str] = {}
        capacity = figures.get("capacity", 1.0)
        predicted = figures.get("predicted", capacity)
        if predicted < STARVED * capacity:
            found["depth_starved"] = (
                f"layer {layer} is starved: in evaluation {predicted:.0%} of the tokens go through "
                f"it, in training {capacity:.0%}"
            )
        gate = figures.get("gate", 1.0)
        if gate < IDLE:
            found["depth_idle"] = (
                f"layer {layer} is idle: the mean gate of the tokens that it computes is {gate:.3f}"
            )
        always, never = figures.get("always", 0.0), figures.get("never", 0.0)
        if capacity < 1 and always + never > FROZEN:
            found["depth_frozen"] = (
                f"the choice of layer {layer} is frozen: {always:.0%} of the positions always go "
                f"through, {never:.0%} never"
            )
        chance = capacity**2 + (1 - capacity) ** 2
        agreement = figures.get("agreement", 1.0)
        if agreement < chance + UNSKILLED * (1 - chance):
            found["predictor_off"] = (
                f"the predictor of layer {layer} agrees with {agreement:.0%} of the choices, "
                f"chance with {chance:.0%}"
            )
        return found
