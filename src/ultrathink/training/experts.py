"""Collects the routing statistics of a step for observers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ultrathink.model.experts.router import LayerRouting
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.experts import ExpertStatistics, GroupSlots
from ultrathink.parallel.world import Group
from ultrathink.training.stepping import StepResult


def read_experts(
    model: Transformer, result: StepResult, dp_group: Group
) -> ExpertStatistics | None:
    """How a step's tokens were spread over experts, summed over all processes; all call it.

    None for a model without experts.
    """
    layers = model.expert_layers()
    if not layers or model.routing is None:
        return None
    routers = [layer.router for layer in layers.values()]
    names = [name for name in LayerRouting._fields if f"expert_{name}" in result.stats]
    parts = [result.stats[f"expert_{name}"].double() for name in names]
    sizes = [part.shape[1] for part in parts]
    sums = dp_group.summed(torch.cat(parts, 1)).cpu()  # a single all-reduce
    split = zip(names, sums.split(sizes, 1), strict=True)
    values: dict[str, Any] = {name: part.numpy() for name, part in split}
    tokens = None
    if model.depth is not None:  # some pass by, and every other one has its experts
        per_token = sum(group.top_k for group, _ in routers[0].groups())
        tokens = np.round(values["load"].sum(1) / per_token)
    return ExpertStatistics(
        groups=tuple(
            GroupSlots(group.name, group.top_k, slots.start, slots.stop)
            for group, slots in routers[0].groups()
        ),
        layers=tuple(layers),
        num_tokens=result.num_tokens,
        tokens=tokens,
        warmup=model.routing.now().warmup.item(),
        active=np.stack([router.active.cpu().numpy() for router in routers]),
        **values,
    )
