"""Folds the live routing controls of a checkpoint into its weights, if that is exact.

In evaluation the router's logits are multiplied by warm-up / temperature, which its weights can
absorb. A bias that selects experts without weighting them cannot be absorbed. Slots without an
expert are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ultrathink.config.model import ModelConfig
from ultrathink.interop.values import cannot_export


def fold_routing(
    state: Mapping[str, Tensor], config: ModelConfig, source: Path
) -> tuple[dict[str, Tensor], ModelConfig, list[str]]:
    """The weights ``state`` of ``source`` for a plain router without empty slots, the configuration
    that they fit, and a remark for each change.

    How many experts there are follows from the checkpoint. Raises ConfigError if layers have
    different numbers of them, if some are split, and if a bias selects experts.
    """
    folded = dict(state)
    if config.moe is None:
        return folded, config, []
    (group,) = config.moe.groups
    _check_counts(state, config, source)
    scale = (state["routing.warmup"] / state["routing.temperature"]).double()
    for layer in range(config.num_layers):
        place = f"blocks.{layer}.feed_forward."
        router = f"{place}router"
        active, bias = state[f"{router}.active"], state[f"{router}.selection_bias"]
        largest = bias[active].abs().max().item()
        if largest > 0:
            raise cannot_export(
                f"{source}: {router}.selection_bias is up to {largest:.3g}, and Mixtral has no "
                f"selection bias: without it, tokens would go to other experts.",
                "model.moe.balance.bias_rate=0 from its first step",
            )
        weight = state[f"{router}.weight"]
        if scale != 1:
            folded[f"{router}.weight"] = (weight.double() * scale).to(weight.dtype)
        for name in list(folded):
            if name == f"{router}.weight" or name.startswith(f"{place}experts."):
                folded[name] = folded[name][active]
    count = int(active.sum())
    groups = (group.model_copy(update={"num_experts": count, "max_experts": None}),)
    moe = config.moe.model_copy(update={"groups": groups})
    return folded, config.model_copy(update={"moe": moe}), _remarks(state)


def _check_counts(state: Mapping[str, Tensor], config: ModelConfig, source: Path) -> None:
    """Raise ConfigError unless all layers have equally many experts, none of them split."""
    routers = [f"blocks.{layer}.feed_forward.router" for layer in range(config.num_layers)]
    split = [number for number, one in enumerate(routers) if state[f"{one}.branch"].any()]
    if split:
        raise cannot_export(
            f"{source}: experts in layer {', '.join(map(str, split))} are split, which Mixtral "
            f"lacks: there their parts would compete for tokens.",
            "ReleaseExperts before its last steps",
        )
    counts = [int(state[f"{one}.active"].sum()) for one in routers]
    if len(set(counts)) > 1:
        listed = ", ".join(f"layer {layer}: {count}" for layer, count in enumerate(counts))
        raise cannot_export(
            f"{source}: layers have different numbers of experts ({listed}), and Mixtral has one "
            f"number for all.",
            "equally many in each layer (AddExpert and PruneExpert take 'all')",
        )


def _remarks(state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"routing has a {name} of {state[f'routing.{name}'].item():.3g}, which Mixtral lacks; "
        f"the router's weights are {verb} by it"
        for name, verb in (("temperature", "divided"), ("warmup", "multiplied"))
        if state[f"routing.{name}"] != 1
    ]
