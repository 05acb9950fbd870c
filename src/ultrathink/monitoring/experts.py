"""How evenly a router spreads tokens over the experts of a group, in figures.

In a group of N experts, top-k, of T tokens: ``n_i`` tokens chose expert i, ``m_i`` of them it took
(the others were dropped for want of capacity), and ``p_t`` is the router's distribution for token
t, with entropy ``H_t``. For even routing every load is ``k·T / N``. Without tokens a ratio is 0.
Empty slots for experts are no experts here.

Shapes: L layers with experts, E slots of all groups, G groups, N experts of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]
    Figures: TypeAlias = dict[str, Floats]  # by name; [L]

COUNTS = frozenset({"dropped", "dead"})  # figures that are whole numbers

# What a line of metrics.jsonl tells of a group, and how layers become one figure.
_SUMMARY: dict[str, Callable[[Floats], Any]] = {
    "entropy_normalized": np.mean,
    "confidence": np.mean,
    "utilization": np.mean,
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
    """What the routers of a model did with the tokens of one step, as sums over tokens."""

    groups: tuple[GroupSlots, ...]
    layers: tuple[int, ...]  # indices of those with experts
    num_tokens: int
    active: npt.NDArray[np.bool_]  # [L, E]: false for empty slots
    load: Floats  # [L, E]: tokens that chose each expert
    dropped: Floats  # [L, E]: those of them that it had no capacity for
    probability: Floats  # [L, E]: the router's probabilities
    entropy: Floats  # [L, G]: of each token's distribution, nats
    confidence: Floats  # [L, G]: each token's largest probability
    warmup: float = 1.0  # from 0, where routing is uniform, to 1, where it is learned

    @cached_property
    def figures(self) -> dict[str, Figures]:
        """Every figure of every group, for all layers: ``figures["skill"]["gini"]`` is ``[L]``."""
        return {
            group.name: self._figures_of(group, self.entropy[:, column], self.confidence[:, column])
            for column, group in enumerate(self.groups)
        }

    def _figures_of(self, group: GroupSlots, entropy: Floats, confidence: Floats) -> Figures:
        active = self.active[:, group.slots]
        parts = [values[:, group.slots] for values in (self.load, self.dropped, self.probability)]
        counts = active.sum(1)
        figures: Figures = {}
        # As a rule all layers have equally many experts of a group, and one pass does for all.
        for count in np.unique(counts[counts > 0]):
            rows = counts == count
            load, dropped, probability = (
                part[rows][active[rows]].reshape(-1, count) for part in parts
            )
            found = GroupLoad(
                load,
                dropped,
                probability,
                entropy[rows],
                confidence[rows],
                num_tokens=self.num_tokens,
                top_k=group.top_k,
            ).figures()
            for name, values in found.items():
                figures.setdefault(name, np.zeros(len(counts)))[rows] = values
        return figures

    def summary(self) -> dict[str, float | int]:
        """A few figures a group, over all layers, as ``experts/<group>/<figure>``.

        Means of ``entropy_normalized``, ``confidence`` and ``utilization``, the largest ``gini``
        and ``max_exp_multi`` of any layer, sums of ``dead`` and ``dropped``.
        """
        return {
            f"experts/{group}/{name}": _short(name, over_layers(figures[name]))
            for group, figures in self.figures.items()
            for name, over_layers in _SUMMARY.items()
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
    """A figure for a file: six digits tell all there is to tell."""
    if name in COUNTS:
        return round(value)
    return float(f"{value:.6g}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True, eq=False)
class GroupLoad:
    """The load of one group in layers that have equally many experts of it, summed over tokens."""

    load: Floats  # [L, N]
    dropped: Floats  # [L, N]
    probability: Floats  # [L, N]
    entropy: Floats  # [L]
    confidence: Floats  # [L]
    num_tokens: int
    top_k: int

    def figures(self) -> Figures:
        """Every figure of the group, by name: ``[L]`` each."""
        load, T, k = self.load, self.num_tokens, self.top_k
        L, N = load.shape
        taken = load - self.dropped
        entropy = per_token(self.entropy, T)
        return {
            "entropy": entropy,
            "entropy_normalized": normalized_entropy(entropy, N),
            "confidence": per_token(self.confidence, T),
            "k_max": k_max(load, T),
            "k_rel": k_rel(load, T, k),
            "s_rel": s_rel(self.probability, T),
            "load_variance": load_variance(load, T),
            "max_exp_multi": max_exp_multi(taken),
            "gini": gini(load),
            "gini_of_noise": np.full(L, gini_of_noise(N, k, T)),
            "utilization": utilization_efficiency(load),
            "balance_score": balance_score(load),
            "max_min": max_min(load),
            "capacity_utilization": capacity_utilization(taken, T, k),
            "experts_per_token": per_token(taken.sum(-1), T),
            "dropped": self.dropped.sum(-1),
            "dead": dead(load),
        }


# -- figures: each maps [..., N], over the experts of a group, to [...] ----------------------------


def per_token(total: Floats, num_tokens: int) -> Floats:
    """Mean over tokens ``Σ_t x_t / T`` of what was summed over them.

    The routing entropy ``Σ H_t / T`` is one, in nats; so is the router's confidence
    ``Σ max_i p_ti / T``, and the experts per token ``Σ m_i / T``, which is k unless some drop it.
    """
    mean: Floats = total / max(1, num_tokens)
    return mean


def normalized_entropy(entropy: Floats, num_experts: int) -> Floats:
    """Routing entropy over its maximum, ``H / ln N``: 1 where all are equally likely, or alone."""
    return entropy / math.log(num_experts) if num_experts > 1 else np.ones_like(entropy)


def k_max(load: Floats, num_tokens: int) -> Floats:
    """The share of tokens that chose the busiest expert, ``max n_i / T``."""
    return per_token(load.max(-1), num_tokens)


def k_rel(load: Floats, num_tokens: int, top_k: int) -> Floats:
    """``k_max`` over what it is for even loads, ``max n_i / (k·T / N)``: from 1 to N / k."""
    return per_token(load.max(-1) * load.shape[-1] / top_k, num_tokens)


def s_rel(probability: Floats, num_tokens: int) -> Floats:
    """The largest mean probability over an even one, ``N·max_i Σ_t p_ti / T``: from 1 to N."""
    return per_token(probability.max(-1) * probability.shape[-1], num_tokens)


def load_variance(load: Floats, num_tokens: int) -> Floats:
    """Variance over experts of the share of tokens that each has, ``Var(n_i / T)``."""
    variance: Floats = per_token(load, num_tokens).var(-1)
    return variance


def max_exp_multi(taken: Floats) -> Floats:
    """What the busiest expert took, after drops, over the mean: ``max m_i / mean m``, 1 to N."""
    return _ratio(taken.max(-1), taken.mean(-1))


def gini(load: Floats) -> Floats:
    """Gini coefficient ``Σ_i Σ_j |n_i - n_j| / (2·N·Σ n)``: 0 for even loads, 1 - 1/N for one.

    Of ordered loads, ``Σ_i (2·i - N - 1)·n_i / (N·Σ n)`` is the same.
    """
    N = load.shape[-1]
    return _ratio(np.sort(load, -1) @ (2.0 * np.arange(1, N + 1) - N - 1), N * load.sum(-1))


def gini_of_noise(num_experts: int, top_k: int, num_tokens: int) -> float:
    """What ``gini`` is if every token draws its experts evenly and at random, in the mean, nearly.

    A load is then nearly normal with variance ``s² = T·q·(1 - q)``, ``q = k / N``. The loads' sum
    is fixed, so two of them differ with variance ``2·s²·N / (N - 1)``, by ``√(2/π)`` times its root
    in the mean: Gini = ``√(1 - 1/N)·s / (T·q·√π)``.
    """
    N, T, q = num_experts, max(1, num_tokens), top_k / num_experts
    deviation = math.sqrt(T * q * (1 - q))
    largest = 1 - 1 / N  # few tokens are not normal
    return min(largest, math.sqrt(largest) * deviation / (T * q * math.sqrt(math.pi)))


def utilization_efficiency(load: Floats) -> Floats:
    """Mean load over maximum load, ``mean n / max n``: 1 for even loads, 1/N for one."""
    return _ratio(load.mean(-1), load.max(-1))


def balance_score(load: Floats) -> Floats:
    """``1 - std n / mean n``: 1 for even loads, below 0 for very uneven, from 1 - √(N-1) up."""
    return 1 - _ratio(load.std(-1), load.mean(-1))


def max_min(load: Floats) -> Floats:
    """The largest load over the smallest, ``max n / max(min n, 1)``: over 1 where none came."""
    ratio: Floats = load.max(-1) / np.maximum(load.min(-1), 1.0)
    return ratio


def capacity_utilization(taken: Floats, num_tokens: int, top_k: int) -> Floats:
    """How many of the places that even loads fill are filled: ``Σ min(m_i, k·T/N) / (k·T)``.

    So much of the work a capacity of the even load would keep, over the whole batch.
    """
    even = top_k * num_tokens / taken.shape[-1]
    filled: Floats = np.minimum(taken, even).sum(-1)
    return filled / max(1, top_k * num_tokens)


def dead(load: Floats) -> Floats:
    """Experts that no token chose, ``#{i: n_i = 0}``; none where there are no tokens."""
    count: Floats = ((load == 0).sum(-1) * (load.max(-1) > 0)).astype(np.float64)
    return count


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.where(whole > 0, part, 0.0) / np.where(whole > 0, whole, 1.0)
