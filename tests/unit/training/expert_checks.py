"""What must hold of a trainer's experts at any time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink.model.experts.router import Router
from ultrathink.model.experts.splits import parts_of, shares
from ultrathink.training.trainer import Trainer


def inconsistencies(trainer: Trainer) -> list[str]:
    """Contradictions between the buffers of routers, weights, and optimizer states."""
    model = trainer.model
    state: dict[str, Any] = whole(
        {"model": dict(model.state_dict()), "optimizer": trainer.state_dict()["optimizer"]}
    )
    found = []
    for layer, experts in model.expert_layers().items():
        router, place = experts.router, f"blocks.{layer}.feed_forward."
        rows = {
            name: value
            for name, value in state["model"].items()
            if name.startswith((f"{place}experts.", f"{place}router.weight"))
        }
        for name in list(rows):
            moments = state["optimizer"].get(name, {})
            for key, value in moments.items():
                if value.dim():
                    if value.shape != rows[name].shape:
                        found.append(f"{name}: {key} is {list(value.shape)}")
                    rows[f"{name}/{key}"] = value
        for name, value in rows.items():
            is_used = value.flatten(1).abs().sum(1) > 0
            if bool((is_used & ~router.active).any()):
                found.append(f"{name} has numbers in an empty slot")
            if "/" not in name and not bool(is_used[router.active].all()):
                found.append(f"{name} has an expert of zeros")
        if bool(router.selection_bias[~router.active].any()):
            found.append(f"{place}: a bias in an empty slot")
        found += [f"{place}: {text}" for text in contradictions(router)]
    has_splits = any(bool(one.router.branch.any()) for one in model.expert_layers().values())
    if model.has_splits != has_splits:
        found.append(f"has_splits is {model.has_splits}")
    return found


def whole(node: Any) -> Any:
    """Nested values, their tensors detached and gathered from all processes."""
    if isinstance(node, Tensor):
        return (node.full_tensor() if isinstance(node, DTensor) else node).detach()
    return {key: whole(value) for key, value in node.items()} if isinstance(node, dict) else node


def contradictions(router: Router) -> list[str]:
    """Contradictions between the buffers of a router, for random tokens."""
    branch, side, found = router.branch, router.side, []
    is_split = (branch != 0).any(0)
    if not torch.equal(is_split, side.any(1)):
        found.append("a hyperplane without a split, or the reverse")
    if bool(branch[~router.active].any()):
        found.append("an empty slot is part of a split")
    x = torch.randn(1, 200, side.shape[1] - 1).to(side)
    may_be, share = parts_of(x, side, branch)
    may_be = may_be & router.active
    for config, slots in router.groups():
        choices = (share * router.active)[slots].sum()
        if not torch.equal(may_be[..., slots].sum(-1), choices.expand(1, 200).long()):
            found.append(f"group {config.name}: tokens have different numbers of choices")
        if choices < config.top_k:
            found.append(f"group {config.name} has {float(choices)} choices")
        outside = branch[slots].clone()
        outside[:, slots] = 0
        if bool(outside.any()):
            found.append(f"group {config.name} shares a split with another")
    if not torch.equal(share.float(), shares(branch).float()):
        found.append("shares differ")
    return found


def logits_of(trainer: Trainer, input_ids: Tensor) -> Tensor:
    """Of the whole model in evaluation mode."""
    with torch.no_grad():
        logits: Tensor = trainer.model.eval()(input_ids).logits
    trainer.model.train()
    return logits
