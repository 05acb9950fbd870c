"""What depth routing does in each layer: who goes through, and how well that is predicted.

In evaluation a predictor decides which tokens go through a layer. Of n tokens it would let ``p``
through, in training a router chose ``c``, and ``h`` tokens are of both kinds.

Shapes: L layers with depth routing, T positions of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]

PREFIX = "depth"
FEWEST = 8  # tokens at a position before "always" or "never" says something about it


@dataclass(frozen=True, eq=False)
class DepthStatistics:
    """Depth routing in one step, as sums over trained tokens."""

    layers: tuple[int, ...]  # indices
    capacity: float  # of training, the share of each sequence's tokens
    num_tokens: int
    flops_saved: float  # share of a step's operations that the dense model would take
    selected: Floats  # [L]: chosen tokens
    score: Floats  # [L]: their scores
    gate: Floats  # [L]: and gates
    by_place: Floats  # [L, T]: chosen tokens at each position
    at_place: Floats  # [T]: all tokens there
    is_by_place: bool = False  # positions decide, by configuration
    losses: Floats | None = None  # [L + 1]: of the tokens that each layer chose, and of all; nats
    positive: Floats | None = None  # [L]: tokens that the predictor lets through; None without one
    hits: Floats | None = None  # [L]: chosen tokens among them
    threshold: Floats | None = None  # [L]: of the predictor's logit

    @cached_property
    def figures(self) -> dict[str, Floats]:
        """Every figure by name, ``[L]``."""
        n, chosen = max(1, self.num_tokens), self.selected
        is_seen = self.at_place >= FEWEST
        at, by = self.at_place[is_seen], self.by_place[:, is_seen]
        places = max(1, len(at))
        figures = {
            "capacity": np.full(len(self.layers), self.capacity),
            "selected": chosen / n,
            "score": _ratio(self.score, chosen),
            "gate": _ratio(self.gate, chosen),
        }
        if not self.is_by_place:
            # Of the positions with enough tokens, those whose tokens all go through, or none.
            figures["always"] = (by == at).sum(1) / places
            figures["never"] = (by == 0).sum(1) / places
        if self.losses is not None:
            passing, total = self.losses[:-1], self.losses[-1]
            figures["chosen_loss"] = _ratio(passing, chosen)
            figures["skipped_loss"] = _ratio(total - passing, n - chosen)
        if self.positive is not None and self.hits is not None and self.threshold is not None:
            figures["predicted"] = self.positive / n
            figures["agreement"] = (n - self.positive - chosen + 2 * self.hits) / n
            figures["precision"] = _ratio(self.hits, self.positive)
            figures["recall"] = _ratio(self.hits, chosen)
            figures["threshold"] = self.threshold
        return figures

    def metrics(self) -> dict[str, float]:
        """The figures as ``depth/<layer>/<figure>``, and ``depth/flops_saved``."""
        found = {
            f"{PREFIX}/{layer}/{name}": float(f"{value:.6g}")
            for name, values in self.figures.items()
            for layer, value in zip(self.layers, values.tolist(), strict=True)
        }
        return {f"{PREFIX}/flops_saved": float(f"{self.flops_saved:.6g}"), **found}


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.where(whole > 0, part, 0.0) / np.where(whole > 0, whole, 1.0)


def of_layers(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """The figures of each layer in ``metrics``, whose names begin with a layer's number."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        layer, _, figure = name.partition("/")
        if figure:
            found.setdefault(layer, {})[figure] = value
    return found
