"""Experts that no token reaches any more."""

from __future__ import annotations

import torch
from fault_injection import Fault, Moment

UNREACHABLE = -1e4  # a bias that the balancing would take a million steps to undo
SHARE = 0.75


class DeadExperts(Fault):
    """Three of four experts of each group get a bias that keeps every token away, once.

    As many as a token is sent to are left in each group.
    """

    name = "dead_experts"
    group = "experts"
    model = "moe"

    @torch.no_grad()
    def before_update(self, moment: Moment) -> None:
        for layer in moment.model.expert_layers().values():
            for group, slots in layer.router.groups():
                dead = min(int(SHARE * group.num_experts), group.num_experts - group.top_k)
                layer.router.selection_bias[slots.start : slots.start + dead] = UNREACHABLE


FAULT = DeadExperts
