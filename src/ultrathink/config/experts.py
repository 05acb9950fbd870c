"""Section ``model.moe``: groups of experts in place of feed-forward layers.

Mixtral is one group of 8, top-2 (https://arxiv.org/abs/2401.04088); MoE³ is four groups side by
side: knowledge 64 top-2, skill 32 top-2, meta 16 top-1, safety 8 top-1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from ultrathink.config.base import Section, alike, no_truth_values, one_of
from ultrathink.config.options import felt, fixed, free
from ultrathink.core.layers import layer_index
from ultrathink.core.registry import Registry

EXPERT_BACKENDS: Registry[Callable[..., Any]] = Registry("expert backend")
EXPERT_BACKENDS.add("grouped_mm", "ultrathink.model.experts.products:GroupedMM")
EXPERT_BACKENDS.add("batched", "ultrathink.model.experts.products:Batched")
EXPERT_BACKENDS.add("loop", "ultrathink.model.experts.products:Loop")

# Rows of a matrix must begin at multiples of 16 bytes for the grouped product: 8 numbers of bf16.
WIDTH_STEP = 8

BIAS_RATE = 0.005  # of several groups; one group is a Mixtral, which has no bias

# What the shape of the weights, or what they compute, follows from.
shape = partial(fixed, because="the weights would no longer fit or mean what they did")


class ExpertGroupConfig(Section):
    """Experts that compete with each other for tokens; groups do not compete."""

    name: str = shape(min_length=1, pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """What the group is called in metrics and messages."""
    num_experts: int = shape(gt=0)
    """Experts of the group."""
    top_k: int = shape(gt=0)
    """Experts of the group that each token is sent to."""
    max_experts: int | None = shape(None, gt=0)
    """Slots for experts; those beyond num_experts are empty, for experts that are added during
    training. num_experts when unset."""

    @property
    def num_slots(self) -> int:
        """Experts there is room for."""
        return self.max_experts or self.num_experts

    @model_validator(mode="after")
    def _numbers_fit(self) -> ExpertGroupConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) of group {self.name!r} is above its num_experts "
                f"({self.num_experts}); a token cannot be sent to more experts than there are"
            )
        if self.max_experts is not None and self.max_experts < self.num_experts:
            raise ValueError(
                f"max_experts ({self.max_experts}) of group {self.name!r} is below its "
                f"num_experts ({self.num_experts}); it counts all slots, the empty ones too"
            )
        return self


class RoutingConfig(Section):
    """How tokens find experts; each value can be changed during training."""

    temperature: float = felt(1.0, gt=0)
    """Divides the router's logits."""
    jitter: float = felt(0.0, ge=0, lt=1)
    """In training the router's input is multiplied by noise between 1 - jitter and 1 + jitter."""
    capacity_factor: float | None = felt(None, gt=0)
    """Tokens of a sequence that an expert takes in training, as a multiple of the even share;
    beyond it those with the lowest scores are dropped. No limit when unset."""
    expert_dropout: float = felt(0.0, ge=0, lt=1)
    """Probability that an expert is closed to a sequence, in training."""
    warmup_steps: int = felt(100, ge=0)
    """Steps over which routing goes from nearly uniform to learned."""


class BalanceConfig(Section):
    """What keeps the load of a group's experts even; 0 leaves a term out.

    The losses are summed over groups and layers. The defaults kept experts busiest at the least
    cost in loss (docs/experts.md).
    """

    load: float = felt(0.01, ge=0)
    """Weight of N·Σ P_i·f_i, mean probability times load (Switch)."""
    importance: float = felt(0.0, ge=0)
    """Weight of the squared coefficient of variation of Σ P_i."""
    entropy: float = felt(0.0, ge=0)
    """Weight of 1 - H/ln N, which rewards router distributions that are spread."""
    z: float = felt(0.0, ge=0)
    """Weight of the squared log-partition of the router."""
    bias_rate: float | None = felt(None, ge=0)
    """Change per step of a bias on the logits by which experts are chosen: up for those below the
    mean load, down for those above. When unset, 0.005 for several groups, and 0 for one, which can
    then be exported as a Mixtral."""
    groups: float = felt(0.03, ge=0)
    """Weight of the loss that raises the gates of the groups of a token's source (group_gates,
    data.train[].groups); summed over layers."""


class MoeConfig(Section):
    """Groups of experts: each token is sent to the top_k of every group."""

    groups: tuple[ExpertGroupConfig, ...] = shape(min_length=1)
    """Groups of experts; a token is sent to the top_k of each."""
    intermediate_size: int | None = shape(None, gt=0)
    """Width of each expert, a multiple of 8; the dense width divided by the experts of a token,
    rounded up to a multiple of 8, when unset."""
    shared_size: int | None = shape(None, gt=0)
    """Width of an expert that every token is sent to; none when unset."""
    layers: Literal["all", "interleaved", "sandwich"] | tuple[int | float, ...] = shape("all")
    """Layers that have experts: all, every second one, all but the first and last, or a list of
    indices and fractions of the depth."""
    score: Literal["softmax", "sigmoid"] = shape("softmax")
    """How logits of the router become scores within a group."""
    normalize_gates: bool = shape(True)
    """Divide the scores of a token's chosen experts by their sum in each group with top_k above
    1."""
    gate_scale: float = shape(1.0, gt=0)
    """Factor on the gates; DeepSeek-V3's routed_scaling_factor."""
    group_gates: bool = shape(False)
    """Multiply the gates of each group by a learned weight for each token, 1 on average over the
    groups, so that groups compete (docs/elastic.md)."""
    backend: Annotated[str, one_of(EXPERT_BACKENDS, "auto")] = free("auto")
    """Kernel of the grouped product: a registered name (batched, grouped_mm, loop), or auto to
    choose for the device."""
    routing: RoutingConfig = RoutingConfig()
    """How tokens find experts."""
    balance: BalanceConfig = BalanceConfig()
    """What keeps the load even."""

    _layers = field_validator("layers", mode="before")(no_truth_values)

    @model_validator(mode="after")
    def _groups_fit(self) -> MoeConfig:
        twice = alike([group.name for group in self.groups])
        if twice is not None:
            raise ValueError(f"two groups are called {twice!r}; give each its own name")
        if self.group_gates and len(self.groups) == 1:
            raise ValueError(
                f"group_gates weighs groups against each other, and {self.groups[0].name!r} is the "
                f"only one; add a group, or leave group_gates out"
            )
        for key in ("intermediate_size", "shared_size"):
            width = getattr(self, key)
            if width is not None and width % WIDTH_STEP:
                below = width // WIDTH_STEP * WIDTH_STEP
                nearest = f"{below} or {below + WIDTH_STEP}" if below else str(WIDTH_STEP)
                raise ValueError(
                    f"{key} ({width}) must be a multiple of {WIDTH_STEP}, because the grouped "
                    f"product reads rows of 16 bytes; use {nearest}"
                )
        return self

    @property
    def num_slots(self) -> int:
        """Slots for experts, of all groups."""
        return sum(group.num_slots for group in self.groups)

    @property
    def experts_per_token(self) -> int:
        """Experts that a token is sent to, over all groups."""
        return sum(group.top_k for group in self.groups)

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The layers with experts, ascending; ConfigError for one that is not there."""
        if self.layers == "all":
            return tuple(range(num_layers))
        if self.layers == "interleaved":
            return tuple(range(1, num_layers, 2))
        if self.layers == "sandwich":
            return tuple(range(1, num_layers - 1))
        where = "model.moe.layers"
        return tuple(sorted({layer_index(layer, num_layers, where) for layer in self.layers}))
