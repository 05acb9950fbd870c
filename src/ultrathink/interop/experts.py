"""Experts in the ``config.json`` of a Mixtral, and which of our configurations match them.

Mixtral has one group of experts in every layer. A token's gates are the router's probabilities of
the experts that it chose, divided by their sum: for top-1 too, whose gate is then 1.
https://arxiv.org/abs/2401.04088

Training options (``router_jitter_noise``, ``router_aux_loss_coef``) are neither read nor written:
here they have other meanings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ultrathink.config.experts import MoeConfig
from ultrathink.config.model import ModelConfig
from ultrathink.interop.values import Values, cannot_export

GROUP = "experts"  # what its only group is called here


def read_mixtral(config: Values) -> dict[str, Any]:
    """The section ``model.moe`` of a Mixtral; CheckpointError for one that cannot be expressed.

    Its routing is unchanged, and balanced without the bias, which Mixtral lacks.
    """
    num_experts = config.count("num_local_experts", 8)
    top_k = config.count("num_experts_per_tok", 2)
    if top_k == 1 and num_experts > 1:
        raise config.unfit(
            "num_experts_per_tok",
            "Mixtral gives a token's only expert the weight 1, here it has that of its "
            "probability, without which the router would learn nothing. Take a checkpoint with 2 "
            "or more",
        )
    return {
        "groups": [{"name": GROUP, "num_experts": num_experts, "top_k": top_k}],
        "intermediate_size": config.count("intermediate_size"),
        "routing": {"warmup_steps": 0},
        "balance": {"bias_rate": 0.0},
    }


def write_mixtral(moe: MoeConfig) -> dict[str, Any]:
    """The keys of a ``config.json`` for experts that ``check_mixtral`` accepts."""
    (group,) = moe.groups
    return {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": group.num_experts,
        "num_experts_per_tok": group.top_k,
        "output_router_logits": False,
    }


def check_mixtral(config: ModelConfig) -> None:
    """Raise ConfigError naming the first value that Mixtral cannot express.

    Slots without an expert are allowed: they do not change the result.
    """
    for problem, remedy in _problems(config):
        raise cannot_export(f"{problem}.", remedy)


def _problems(config: ModelConfig) -> Iterator[tuple[str, str]]:
    moe = config.moe
    assert moe is not None, "a model with experts"
    for name in ("qk_norm", "qkv_bias"):
        if getattr(config, name):
            what = f"model.{name} is true, which Mixtral, the family with experts, lacks"
            yield what, f"model.{name}=false, or without experts"
    if len(moe.groups) > 1:
        names = ", ".join(group.name for group in moe.groups)
        what = f"model.moe.groups has {len(moe.groups)} groups ({names}), and Mixtral has one"
        yield what, "one group"
    if moe.shared_size is not None:
        what = f"model.moe.shared_size is {moe.shared_size}, and Mixtral has no shared expert"
        yield what, "model.moe.shared_size=null"
    if len(config.expert_layers) < config.num_layers:
        layers = moe.layers if isinstance(moe.layers, str) else list(moe.layers)
        what = f"model.moe.layers is {layers}, and Mixtral has experts in all layers"
        yield what, "model.moe.layers=all"
    if moe.score != "softmax":
        what = f"model.moe.score is {moe.score}, and Mixtral has softmax"
        yield what, "model.moe.score=softmax"
    if moe.gate_scale != 1:
        what = f"model.moe.gate_scale is {moe.gate_scale}, and Mixtral takes gates as they are"
        yield what, "model.moe.gate_scale=1"
    group = moe.groups[0]
    if group.top_k == group.num_experts:
        return  # probabilities of all experts sum to 1 as they are
    if group.top_k == 1:
        what = (
            "model.moe.groups.0.top_k is 1, and Mixtral gives a token's only expert the weight 1, "
            "not that of its probability"
        )
        yield what, "a top_k of 2 or more"
    if not moe.normalize_gates:
        what = (
            "model.moe.normalize_gates is false, and Mixtral divides the scores of a token's "
            "experts by their sum"
        )
        yield what, "model.moe.normalize_gates=true"
