"""How evenly a router spreads tokens over the experts of a group, in figures.

With load ``n_i`` the tokens that chose expert i of a group with N experts, top-k, and T tokens; for
even routing every load is ``k·T / N``. Empty slots for experts are no experts here.

Shapes: L layers with experts, E slots of all groups, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupSlots:
    """A group of experts and its slots."""

    name: str
    top_k: int
    start: int
    stop: int


@dataclass(frozen=True)
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

    def of_groups(self) -> Iterator[tuple[int, str, GroupLoad]]:
        """Each layer's groups: the layer's index, the group's name, and its load."""
        for row, layer in enumerate(self.layers):
            for column, group in enumerate(self.groups):
                active = self.active[row, group.start : group.stop]
                load, dropped, probability = (
                    values[row, group.start : group.stop][active]
                    for values in (self.load, self.dropped, self.probability)
                )
                yield (
                    layer,
                    group.name,
                    GroupLoad(
                        load,
                        dropped,
                        probability,
                        num_tokens=max(1, self.num_tokens),
                        top_k=group.top_k,
                        entropy=float(self.entropy[row, column]),
                        confidence=float(self.confidence[row, column]),
                    ),
                )


@dataclass(frozen=True)
class GroupLoad:
    """The load of one group in one layer; arrays are ``[N]``."""

    load: Floats
    dropped: Floats
    probability: Floats
    num_tokens: int
    top_k: int
    entropy: float  # summed over tokens
    confidence: float  # likewise

    def metrics(self) -> dict[str, float]:
        """Every figure of the group, by name."""
        taken = self.load - self.dropped
        even = self.top_k / len(self.load)
        share = self.load / self.num_tokens
        mean_entropy = self.entropy / self.num_tokens
        return {
            "entropy": mean_entropy,
            "entropy_normalized": normalized_entropy(mean_entropy, len(self.load)),
            "k_max": float(share.max()),
            "k_rel": float(share.max()) / even,
            "s_rel": len(self.load) * float(self.probability.max()) / self.num_tokens,
            "load_variance": float(share.var()),
            "max_exp_multi": imbalance(taken),
            "gini": gini(self.load),
            "gini_of_noise": gini_of_noise(len(self.load), self.top_k, self.num_tokens),
            "utilization": utilization_efficiency(self.load),
            "balance_score": balance_score(self.load),
            "max_min": max_min(self.load),
            "capacity_utilization": capacity_utilization(taken, self.num_tokens, self.top_k),
            "experts_per_token": float(taken.sum()) / self.num_tokens,
            "dropped": float(self.dropped.sum()),
            "dead": float((self.load == 0).sum()),
            "confidence": self.confidence / self.num_tokens,
        }


def gini(load: Floats) -> float:
    """Gini coefficient ``Σ_i Σ_j |n_i - n_j| / (2·N·Σ n)``: 0 for even loads, 1 - 1/N for one."""
    total = float(load.sum())
    if total == 0:
        return 0.0
    ranks = np.arange(1, len(load) + 1)
    ordered = np.sort(load)
    return float((2 * ranks - len(load) - 1) @ ordered) / (len(load) * total)


def gini_of_noise(num_experts: int, top_k: int, num_tokens: int) -> float:
    """What ``gini`` would be if every token drew its experts evenly and at random, about.

    The loads are then nearly normal with variance ``s² = T·q·(1 - q)``, ``q = k / N``, and the mean
    difference of two normal variables is ``2s/√π``: Gini ≈ ``s / (T·q·√π)``.
    """
    share = top_k / num_experts
    mean = num_tokens * share
    return math.sqrt(num_tokens * share * (1 - share)) / (mean * math.sqrt(math.pi))


def utilization_efficiency(load: Floats) -> float:
    """Mean load over maximum load: 1 for even loads, 1/N for one."""
    return float(load.mean()) / max(float(load.max()), 1e-9)


def balance_score(load: Floats) -> float:
    """One minus standard deviation over mean of the loads: 1 for even ones; may be below 0."""
    return 1 - float(load.std()) / max(float(load.mean()), 1e-9)


def imbalance(load: Floats) -> float:
    """The largest load as a multiple of the mean one."""
    return float(load.max()) / max(float(load.mean()), 1e-9)


def max_min(load: Floats) -> float:
    """The largest load over the smallest; over 1 token where an expert has none."""
    return float(load.max()) / max(float(load.min()), 1.0)


def capacity_utilization(taken: Floats, num_tokens: int, top_k: int) -> float:
    """Share of even loads' places that are filled: ``Σ min(n_i, k·T/N) / (k·T)``."""
    even = top_k * num_tokens / len(taken)
    return float(np.minimum(taken, even).sum()) / (top_k * num_tokens)


def normalized_entropy(entropy: float, num_experts: int) -> float:
    """Entropy over its maximum ``ln N``; 1 where there is one expert."""
    return entropy / math.log(num_experts) if num_experts > 1 else 1.0
