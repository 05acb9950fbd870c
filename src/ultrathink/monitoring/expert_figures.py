"""Lines of ``experts.jsonl`` as figures of a run: one for each group, over its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

_Summary = Callable[[Iterable[float]], float]


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given)


# How the layers of a group become one figure: the worst layer, sums for counts.
_OVER_LAYERS: dict[str, _Summary] = {
    "entropy": min,
    "entropy_normalized": min,
    "utilization": min,
    "balance_score": min,
    "capacity_utilization": max,
    "experts_per_token": min,
    "confidence": _mean,
    "gini": max,
    "gini_of_noise": max,
    "k_max": max,
    "k_rel": max,
    "s_rel": max,
    "load_variance": max,
    "max_exp_multi": max,
    "max_min": max,
    "dead": sum,
    "dropped": sum,
}


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of ``experts.jsonl`` as ``experts/<group>/<figure>``, the worst over its layers.

    ``dropped_share`` is the share of a group's choices that were dropped; ``num_experts`` counts
    the experts of all layers; ``even_load`` is what each would get if all got equally many.
    """
    figures: dict[str, float] = {}
    for group, lists in record.get("groups", {}).items():
        for name, over_layers in _OVER_LAYERS.items():
            values = [float(value) for value in lists.get(name, ()) if value is not None]
            if values:
                figures[f"experts/{group}/{name}"] = float(over_layers(values))
        loads = [load for row in lists.get("load", ()) for load in row if load is not None]
        figures[f"experts/{group}/num_experts"] = float(len(loads))
        dropped = figures.get(f"experts/{group}/dropped", 0.0)
        figures[f"experts/{group}/dropped_share"] = dropped / max(1.0, float(sum(loads)))
        figures[f"experts/{group}/even_load"] = float(sum(loads)) / max(1, len(loads))
    return figures
