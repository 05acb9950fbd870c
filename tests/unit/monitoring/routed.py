"""Tokens sent to experts, token by token, and the statistics that a router would give of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ultrathink.monitoring.experts import ExpertStatistics, GroupSlots

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Routed:
    """The tokens of one group in one layer."""

    top_k: int
    probabilities: Floats  # [T, N]
    chosen: npt.NDArray[np.bool_]  # [T, N]
    kept: npt.NDArray[np.bool_]  # [T, N]


def routed(
    seed: int, num_experts: int, top_k: int, num_tokens: int, skew: float = 1.0, drop: float = 0.2
) -> Routed:
    """Random tokens that choose their most probable experts; some experts are liked by all."""
    rng = np.random.default_rng(seed)
    shape = (num_tokens, num_experts)
    logits = rng.normal(size=shape) + skew * rng.normal(size=num_experts)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.zeros(shape, dtype=bool)
    np.put_along_axis(chosen, logits.argsort(1)[:, num_experts - top_k :], True, 1)
    return Routed(top_k, probabilities, chosen, chosen & (rng.random(shape) >= drop))


def statistics(*layers: dict[str, Routed], **options: float) -> ExpertStatistics:
    """The statistics of a model with these groups in each of its layers, which are 1, 3, 5, ..."""
    groups, start = [], 0
    for name, tokens in layers[0].items():
        num_experts = tokens.chosen.shape[1]
        groups.append(GroupSlots(name, tokens.top_k, start, start + num_experts))
        start += num_experts
    tokens = [list(layer.values()) for layer in layers]

    def joined(values: list[list[Floats]]) -> Floats:
        return np.stack([np.concatenate(row) for row in values])

    def entropy(p: Floats) -> float:
        return float(-(p * np.log(p)).sum())

    return ExpertStatistics(
        groups=tuple(groups),
        layers=tuple(range(1, 2 * len(layers), 2)),
        num_tokens=len(tokens[0][0].chosen),
        active=np.ones((len(layers), start), dtype=bool),
        load=joined([[t.chosen.sum(0, dtype=float) for t in row] for row in tokens]),
        dropped=joined([[(t.chosen & ~t.kept).sum(0, dtype=float) for t in row] for row in tokens]),
        probability=joined([[t.probabilities.sum(0) for t in row] for row in tokens]),
        entropy=np.array([[entropy(t.probabilities) for t in row] for row in tokens]),
        confidence=np.array([[t.probabilities.max(1).sum() for t in row] for row in tokens]),
        **options,
    )


def with_loads(
    *loads: list[float], num_tokens: int, top_k: int = 1, **options: float
) -> ExpertStatistics:
    """Statistics of one group, ``skill``, of which only the loads matter: a row for each layer."""
    load = np.array(loads, dtype=float)
    per_layer = np.full((len(loads), 1), 0.5 * num_tokens)
    return ExpertStatistics(
        groups=(GroupSlots("skill", top_k, 0, load.shape[1]),),
        layers=tuple(range(1, 2 * len(loads), 2)),
        num_tokens=num_tokens,
        active=np.ones(load.shape, dtype=bool),
        load=load,
        dropped=np.zeros_like(load),
        probability=load.copy(),
        entropy=per_layer,
        confidence=per_layer,
        **options,
    )
