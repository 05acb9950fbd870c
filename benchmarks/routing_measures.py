"""How a router treats sources and token ids: the four measures of OLMoE, by group of experts.

https://arxiv.org/abs/2409.02060, section 5. Each is a mean over layers, from the experts that the
same tokens chose:

- domain specialization: how far the shares of a source's tokens that an expert gets are from even
  ones, 0 for even shares, 1 if all tokens of a source go to the same experts; mean over sources
- vocabulary specialization: of a token id that occurs 8 times or more, the largest share of its
  occurrences that one expert gets; mean over ids
- co-activation: the largest share of an expert's tokens that another expert of any group gets too;
  mean over experts
- saturation: the share of the choices at the end that were the same half way through training

Shapes: L layers with experts, N tokens, K experts of a token, n experts of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST = 8  # occurrences of a token id


@torch.no_grad()
def choices(model: Any, batches: Iterable[Tensor]) -> Any:
    """The slots ``[L, N, K]`` that the tokens of ``batches`` ``[B, T]`` chose, groups in order."""
    layers = model.expert_layers().values()
    found: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.router.register_forward_hook(
            lambda module, given, result, into=into: into.append(result[0].experts)
        )
        for layer, into in zip(layers, found, strict=True)
    ]
    for ids in batches:
        model(ids)
    for hook in hooks:
        hook.remove()
    return np.stack([torch.cat(each).numpy() for each in found])


def measures(
    chosen: Any, earlier: Any, sources: Any, ids: Any, groups: Mapping[str, tuple[slice, int]]
) -> dict[str, dict[str, float]]:
    """The four measures by group, from ``chosen`` and ``earlier`` ``[L, N, K]``.

    ``sources`` and ``ids`` are ``[N]``; ``groups`` has the slots and ``top_k`` of each.
    """
    found, column = {}, 0
    for name, (slots, top_k) in groups.items():
        columns = slice(column, column := column + top_k)
        num_experts = slots.stop - slots.start
        mine, before = (each[..., columns] - slots.start for each in (chosen, earlier))
        found[name] = {
            "domain": _over_layers(domain, mine, sources, num_experts),
            "vocabulary": _over_layers(vocabulary, mine, ids, num_experts),
            "co_activation": _over_layers(co_activation, chosen, slots),
            "saturation": float((mine[..., None] == before[..., None, :]).any(-1).mean()),
            "even_share": top_k / num_experts,
        }
    return found


def domain(chosen: Any, sources: Any, num_experts: int) -> float:
    """Distance of each source's shares from even ones, from ``chosen`` ``[N, k]``."""
    top_k = chosen.shape[1]
    even = top_k / num_experts
    largest = top_k * (1 - even)
    shares = [_shares(chosen[sources == source], num_experts) for source in np.unique(sources)]
    return float(np.mean([np.abs(each - even).sum() / 2 / largest for each in shares]))


def vocabulary(chosen: Any, ids: Any, num_experts: int) -> float:
    """The largest share that one expert has of a token id, from ``chosen`` ``[N, k]``."""
    counts = np.zeros((int(ids.max()) + 1, num_experts))
    np.add.at(counts, (ids[:, None], chosen), 1)
    times = np.bincount(ids)
    is_often = times >= LEAST
    return float((counts[is_often].max(1) / times[is_often]).mean())


def co_activation(chosen: Any, slots: slice) -> float:
    """The largest share of an expert's tokens that another gets too, from ``chosen`` ``[N, K]``."""
    one_hot = np.zeros((len(chosen), int(chosen.max()) + 1))
    np.put_along_axis(one_hot, chosen, 1, 1)
    pairs = one_hot.T @ one_hot
    tokens = np.diag(pairs).copy()
    np.fill_diagonal(pairs, 0)
    inside = [slot for slot in range(slots.start, min(slots.stop, len(tokens))) if tokens[slot]]
    return float(np.mean([pairs[slot].max() / tokens[slot] for slot in inside]))


def _shares(chosen: Any, num_experts: int) -> Any:
    return np.bincount(chosen.ravel(), minlength=num_experts) / len(chosen)


def _over_layers(measure: Callable[..., float], chosen: Any, *others: Any) -> float:
    return float(np.mean([measure(layer, *others) for layer in chosen]))
