"""Mixtures of experts to test, and what there is to compare of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ultrathink.config.experts import MoeConfig
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.experts.controls import RoutingControls
from ultrathink.model.experts.router import LayerRouting, Router, RoutingPass
from ultrathink.model.experts.sequences import find_sequences
from ultrathink.model.transformer import Transformer

ONE: list[dict[str, Any]] = [{"name": "experts", "num_experts": 4, "top_k": 2}]
# The four groups of MoE³, small, and none of them a power of two.
FOUR: list[dict[str, Any]] = [
    {"name": "knowledge", "num_experts": 7, "top_k": 2},
    {"name": "skill", "num_experts": 6, "top_k": 2},
    {"name": "meta", "num_experts": 5, "top_k": 1},
    {"name": "safety", "num_experts": 3, "top_k": 1},
]
BALANCE = {"load": 0.3, "importance": 0.2, "entropy": 0.1, "z": 0.05}  # none is out of sight
CAPACITY = {"capacity_factor": 1.0}


def mixture(groups: Sequence[dict[str, Any]] = ONE, **options: Any) -> dict[str, Any]:
    """The section ``model.moe`` of a tiny model."""
    return {"groups": groups, "intermediate_size": 16, "balance": BALANCE, **options}


def trained(
    model: Transformer, input_ids: Tensor, labels: Tensor, **options: Any
) -> dict[str, Tensor]:
    """All that a model reports for labelled tokens, sums, and the gradient of every weight."""
    model.zero_grad()
    output = model(input_ids, labels, **options)
    (output.loss + sum(output.aux_losses.values())).backward()
    found = {"loss": output.loss, **output.aux_losses, **output.stats}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach().clone() for name, value in found.items()}


def added(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums over several parts of a batch."""
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def assert_same(expected: dict[str, Tensor], found: dict[str, Tensor], limit: float = 1e-9) -> None:
    """Every loss, sum and gradient of two passes within ``limit``, relative and absolute."""
    assert list(expected) == list(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=limit, atol=limit, msg=name)


def make_router(
    groups: Sequence[dict[str, Any]], dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Router, RoutingControls]:
    """A router of tokens of width 8 whose scores differ, and its controls."""
    config = MoeConfig.model_validate(mixture(groups, **options))
    router = Router(config, 8).to(dtype)
    router.reset_buffers()
    torch.nn.init.normal_(router.weight, 0, 0.7)
    return router, RoutingControls(config).to(dtype)


def routing_pass(
    controls: RoutingControls,
    x: Tensor,
    labels: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> RoutingPass:
    """A pass over the states ``x`` ``[B, T, C]`` through all groups."""
    sequences = find_sequences(labels, document_ids, x, -100)
    return RoutingPass(sequences, controls.now(), ComputePath())


def route(
    router: Router,
    controls: RoutingControls,
    x: Tensor,
    labels: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, LayerRouting]:
    """The experts and gates of each token, ``[B, T, K]`` each, and what is reported."""
    choice, routing = router(x, routing_pass(controls, x, labels, document_ids))
    experts, gates = (part.view(*x.shape[:2], -1) for part in choice)
    return experts, gates, routing
