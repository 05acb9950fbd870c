"""How evenly a router distributes tokens over the experts of a group.

In a group of N experts with top-k routing of T tokens, ``n_i`` tokens chose expert i, which
processed ``m_i`` of them (the others exceeded its capacity and were dropped); ``p_t`` is the
router's distribution for token t, with entropy ``H_t``. Even routing has loads of ``k·T / N``.
Without tokens a ratio is 0. Empty expert slots do not count.

Shapes: L layers with experts, E slots of all groups, G groups, N experts of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]
    Figures: TypeAlias = dict[str, Floats]  # by name; [L]

COUNTS = frozenset({"dropped", "dead"})  # figures that are whole numbers

# The figures of a group in metrics.jsonl, and how layers become one figure.
_SUMMARY: dict[str, Callable[[Floats], Any]] = {
    "entropy_normalized": np.mean,
    "confidence": np.mean,
    "utilization": np.mean,
    "weight": np.mean,
    "gini": np.max,
    "max_exp_multi": np.max,
    "dead": np.sum,
    "dropped": np.sum,
}


@dataclass(frozen=True)
class GroupSlots:
    """A group of experts and its slots."""

    name: str
    top_k: int
    start: int
    stop: int

    @property
    def slots(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class ExpertStatistics:
    """Routing statistics of one step, as sums over tokens."""

    groups: tuple[GroupSlots, ...]
    layers: tuple[int, ...]  # indices of those with experts
    num_tokens: int
    active: npt.NDArray[np.bool_]  # [L, E]: false for empty slots
    load: Floats  # [L, E]: tokens that chose each expert
    dropped: Floats  # [L, E]: those of them beyond its capacity
    probability: Floats  # [L, E]: the router's probabilities
    entropy: Floats  # [L, G]: of each token's distribution, nats
    confidence: Floats  # [L, G]: each token's largest probability
    tokens: Floats | None = None  # [L]: that reached each layer; None: all
    warmup: float = 1.0  # from 0, where routing is uniform, to 1, where it is learned
    group_weight: Floats | None = None  # [L, G]: of each token's groups, with group gates

    @cached_property
    def figures(self) -> dict[str, Figures]:
        """Every figure of every group, for all layers: ``figures["skill"]["gini"]`` is ``[L]``."""
        found = {
            group.name: self._figures_of(group, self.entropy[:, column], self.confidence[:, column])
            for column, group in enumerate(self.groups)
        }
        if self.group_weight is not None:
            for group, weights in zip(self.groups, self.group_weight.T, strict=True):
                # Σ w_t / T, whose mean over groups is 1.
                found[group.name]["weight"] = weights / max(1, self.num_tokens)
        return found

    def _figures_of(self, group: GroupSlots, entropy: Floats, confidence: Floats) -> Figures:
        active = self.active[:, group.slots]
        parts = [values[:, group.slots] for values in (self.load, self.dropped, self.probability)]
        counts = active.sum(1)
        tokens = np.full(len(counts), self.num_tokens) if self.tokens is None else self.tokens
        figures: Figures = {}
        # Layers with equally many experts of a group, and tokens, usually all, go together.
        kinds = set(zip(counts.tolist(), tokens.tolist(), strict=True))
        for count, num_tokens in sorted(kind for kind in kinds if kind[0] > 0):
            rows = (counts == count) & (tokens == num_tokens)
            load, dropped, probability = (
                part[rows][active[rows]].reshape(-1, count) for part in parts
            )
            found = figures_of_group(
                load,
                dropped,
                probability,
                entropy[rows],
                confidence[rows],
                num_tokens=int(num_tokens),
                top_k=group.top_k,
            )
            for name, values in found.items():
                figures.setdefault(name, np.zeros(len(counts)))[rows] = values
        return figures

    def summary(self) -> dict[str, float | int]:
        """A few figures of each group over all layers, as ``experts/<group>/<figure>``.

        Means of ``entropy_normalized``, ``confidence``, ``utilization`` and with group gates
        ``weight``, the largest ``gini`` and ``max_exp_multi`` of any layer, sums of ``dead`` and
        ``dropped``.
        """
        return {
            f"experts/{group}/{name}": _short(name, over_layers(figures[name]))
            for group, figures in self.figures.items()
            for name, over_layers in _SUMMARY.items()
            if name in figures
        }


@dataclass(frozen=True, eq=False)
class ExpertRecord:
    """The statistics of one logged step; ``time`` is in unix seconds."""

    step: int
    time: float
    statistics: ExpertStatistics

    def to_json(self) -> dict[str, Any]:
        """A line of ``experts.jsonl``: each figure as a list over layers, to six digits.

        ``load`` has a list for each layer, with one number for each slot, null for empty ones.
        """
        given = self.statistics
        groups: dict[str, dict[str, list[Any]]] = {}
        for group in given.groups:
            loads, active = (part[:, group.slots].tolist() for part in (given.load, given.active))
            groups[group.name] = {
                name: [_finite(_short(name, value)) for value in values.tolist()]
                for name, values in given.figures[group.name].items()
            }
            groups[group.name]["load"] = [
                [round(load) if is_there else None for load, is_there in zip(*row, strict=True)]
                for row in zip(loads, active, strict=True)
            ]
        return {
            "step": self.step,
            "time": self.time,
            "num_tokens": given.num_tokens,
            "layers": list(given.layers),
            "groups": groups,
        }


def _short(name: str, value: float) -> float | int:
    if name in COUNTS:
        return round(value)
    return float(f"{value:.6g}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def figures_of_group(
    load: Floats,
    dropped: Floats,
    probability: Floats,
    entropy: Floats,
    confidence: Floats,
    *,
    num_tokens: int,
    top_k: int,
) -> Figures:
    """Every figure of a group by name, ``[L]`` each; all layers have equally many experts of it.

    ``load``, ``dropped`` and ``probability`` are ``[L, N]``, ``entropy`` and ``confidence``
    ``[L]``, all summed over tokens.
    """
    T, k, (L, N) = max(1, num_tokens), top_k, load.shape
    mean, taken = load.mean(-1), load - dropped
    # Gini is Σ_i Σ_j |n_i - n_j| / (2·N·Σ n); of ordered loads, Σ_i (2·i - N - 1)·n_i / (N·Σ n).
    spread = np.sort(load, -1) @ (2.0 * np.arange(1, N + 1) - N - 1)
    return {
        # Σ H_t / T, in nats; over ln N it is 1 where all are equally likely, or alone.
        "entropy": entropy / T,
        "entropy_normalized": entropy / T / math.log(N) if N > 1 else np.ones(L),
        # Σ max_i p_ti / T
        "confidence": confidence / T,
        # The share of tokens that chose the busiest expert, max n_i / T; and over what it is for
        # even loads, max n_i / (k·T / N): from 1 to N / k.
        "k_max": load.max(-1) / T,
        "k_rel": load.max(-1) * N / (k * T),
        # The largest mean probability over an even one, N·max_i Σ_t p_ti / T: from 1 to N.
        "s_rel": probability.max(-1) * N / T,
        # Of the share of tokens that each expert has, Var(n_i / T).
        "load_variance": (load / T).var(-1),
        # What the busiest expert took, after drops, over the mean: max m_i / mean m, 1 to N.
        "max_exp_multi": _ratio(taken.max(-1), taken.mean(-1)),
        # 0 for even loads, 1 - 1/N for one.
        "gini": _ratio(spread, N * load.sum(-1)),
        "gini_of_noise": np.full(L, gini_of_noise(N, k, num_tokens)),
        # Mean load over maximum load: 1 for even loads, 1/N for one.
        "utilization": _ratio(mean, load.max(-1)),
        # 1 - std n / mean n: 1 for even loads, below 0 for very uneven, from 1 - √(N-1) up.
        "balance_score": 1 - _ratio(load.std(-1), mean),
        # The largest load over the smallest: over 1 where none came.
        "max_min": load.max(-1) / np.maximum(load.min(-1), 1.0),
        # Σ min(m_i, k·T/N) / (k·T): the share of the work within a capacity of the even load, over
        # the whole batch.
        "capacity_utilization": np.minimum(taken, k * num_tokens / N).sum(-1) / (k * T),
        # Σ m_i / T, which is k unless some drop it.
        "experts_per_token": taken.sum(-1) / T,
        "dropped": dropped.sum(-1),
        # Experts that no token chose; none where there are no tokens.
        "dead": ((load == 0).sum(-1) * (load.max(-1) > 0)).astype(np.float64),
    }


def gini_of_noise(num_experts: int, top_k: int, num_tokens: int) -> float:
    """The expected ``gini`` if every token draws its experts uniformly at random, approximately.

    A load is then nearly normal with variance ``s² = T·q·(1 - q)``, ``q = k / N``. The sum of the
    loads is fixed, so the difference of two has variance ``2·s²·N / (N - 1)``, and a mean absolute
    value of ``√(2/π)`` times its root: Gini = ``√(1 - 1/N)·s / (T·q·√π)``.
    """
    N, T, q = num_experts, max(1, num_tokens), top_k / num_experts
    deviation = math.sqrt(T * q * (1 - q))
    largest = 1 - 1 / N  # of few tokens, whose loads are not normal
    return min(largest, math.sqrt(largest) * deviation / (T * q * math.sqrt(math.pi)))


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.where(whole > 0, part, 0.0) / np.where(whole > 0, whole, 1.0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# How the layers of a group become one figure: the worst layer, sums for counts.
_OVER_LAYERS: dict[str, Callable[[list[float]], float]] = {
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
    "weight": _mean,
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
