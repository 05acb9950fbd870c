"""Folds the live routing controls of a checkpoint into its weights, if that is exact.

In evaluation the router's logits are multiplied by warm-up / temperature, which its weights can
absorb. A bias that selects experts without weighting them cannot be absorbed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.interop.values import cannot_export


def fold_routing(
    state: Mapping[str, Tensor], config: ModelConfig, source: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights ``state`` of ``source`` for a plain router, and a remark for each change.

    Raises ConfigError if a bias selects experts, and CheckpointError if the experts in use are not
    those of ``config``.
    """
    folded = dict(state)
    if config.moe is None:
        return folded, []
    (group,) = config.moe.groups
    scale = (state["routing.warmup"] / state["routing.temperature"]).double()
    for layer in range(config.num_layers):
        router = f"blocks.{layer}.feed_forward.router"
        active, bias = state[f"{router}.active"], state[f"{router}.selection_bias"]
        wanted = torch.arange(len(active)) < group.num_experts
        if not torch.equal(active.cpu(), wanted):
            raise CheckpointError(
                f"{source}: {router}.active has {int(active.sum())} experts in other slots than "
                f"the first {group.num_experts} that model.moe.groups.0.num_experts says; an "
                f"export would leave some out."
            )
        largest = bias[active].abs().max().item()
        if largest > 0:
            raise cannot_export(
                f"{source}: {router}.selection_bias is up to {largest:.3g}, and Mixtral has no "
                f"selection bias: without it, tokens would go to other experts.",
                "model.moe.balance.bias_rate=0 from its first step",
            )
        if scale != 1:
            weight = state[f"{router}.weight"]
            folded[f"{router}.weight"] = (weight.double() * scale).to(weight.dtype)
    return folded, _remarks(state)


def _remarks(state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"routing has a {name} of {state[f'routing.{name}'].item():.3g}, which Mixtral lacks; "
        f"the router's weights are {verb} by it"
        for name, verb in (("temperature", "divided"), ("warmup", "multiplied"))
        if state[f"routing.{name}"] != 1
    ]
