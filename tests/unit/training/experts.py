"""Trainers of mixtures, as overrides."""

from __future__ import annotations

ROUTING = "model.moe.routing={warmup_steps: 0, capacity_factor: 1.0}"
NOISE = (
    "model.moe.routing={warmup_steps: 6, jitter: 0.1, expert_dropout: 0.2, capacity_factor: 1.2}"
)
BALANCE = "model.moe.balance={load: 0.1, importance: 0.1, entropy: 0.1, z: 0.01, bias_rate: 0.01}"
# Two groups, one with empty slots; the first layer has no experts.
MIXTURE = (
    "model.num_layers=3",
    "model.moe={groups: [{name: a, num_experts: 6, top_k: 2, max_experts: 8}, "
    "{name: b, num_experts: 3, top_k: 1}], intermediate_size: 16, shared_size: 16, layers: [1, 2]}",
    BALANCE,
)
ACTIVE = [True] * 6 + [False] * 2 + [True] * 3
GROUPS = (slice(0, 6), slice(8, 11))  # the active slots of each
