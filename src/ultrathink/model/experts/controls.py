"""Live controls of routing, which can change during training.

They are zero-dimensional buffers: a compiled step reads them like any other tensor, and every
checkpoint contains them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultrathink.config.experts import MoeConfig
from ultrathink.core.errors import UltrathinkError, suggestion

# Limits of each: the lower bound, whether it may be equal, and the exclusive upper bound.
LIMITS: dict[str, tuple[float, bool, float]] = {
    "temperature": (0.0, False, float("inf")),
    "jitter": (0.0, True, 1.0),
    "capacity_factor": (0.0, False, float("inf")),
    "expert_dropout": (0.0, True, 1.0),
    "load": (0.0, True, float("inf")),
    "importance": (0.0, True, float("inf")),
    "entropy": (0.0, True, float("inf")),
    "z": (0.0, True, float("inf")),
    "bias_rate": (0.0, True, float("inf")),
    "groups": (0.0, True, float("inf")),
}


class Controls(NamedTuple):
    """The values at one moment, each a zero-dimensional tensor."""

    warmup: Tensor
    """From 0, where routing is uniform, to 1, where it is learned."""
    temperature: Tensor
    jitter: Tensor
    capacity_factor: Tensor
    """Infinite if nothing is dropped."""
    expert_dropout: Tensor
    load: Tensor
    importance: Tensor
    entropy: Tensor
    z: Tensor
    bias_rate: Tensor
    groups: Tensor | None = None
    """Only with group gates, so that older checkpoints have what the model has."""


class RoutingControls(nn.Module):
    """The live values of ``model.moe.routing`` and ``model.moe.balance``, for all layers."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(
            name for name in Controls._fields if name != "groups" or config.group_gates
        )
        for name in self.names:
            self.register_buffer(name, torch.empty((), dtype=torch.float32))
        self.reset()

    def reset(self) -> None:
        """Set every value to the configured one, after warm-up."""
        routing, balance = self.config.routing, self.config.balance
        configured = {**routing.model_dump(), **balance.model_dump(), "warmup": 1.0}
        for name in self.names:
            value = configured[name]
            self.get_buffer(name).fill_(float("inf") if value is None else value)

    def now(self) -> Controls:
        """The values, as tensors that a forward pass reads."""
        return Controls(*(self.get_buffer(name) for name in self.names))

    def get(self, name: str) -> float | None:
        """One value; None for a capacity that nothing exceeds.

        Raises UltrathinkError for one that this model does not have.
        """
        if name not in self.names:
            raise UltrathinkError(
                f"the routing control {name} cannot be changed: this model has no group gates; "
                f"model.moe.group_gates gives it some."
            )
        value = self.get_buffer(name).item()
        return None if value == float("inf") else value

    def set(self, name: str, value: float | None) -> None:
        """Change one value from the next forward pass on.

        ``capacity_factor`` may be None: nothing is dropped. Raises UltrathinkError for an unknown
        name, an invalid value, or a control that this model does not have.
        """
        checked = check_control(name, value)
        self.get(name)
        self.get_buffer(name).fill_(checked)

    def warm_up(self, step: int) -> None:
        """Set the progress from uniform to learned routing in ``step``, counted from 1."""
        steps = self.config.routing.warmup_steps
        self.get_buffer("warmup").fill_(min(1.0, step / steps) if steps else 1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutingControls:
        """Keep the values on the CPU, where reading them needs no synchronization, in float32 or
        float64."""
        for name in self.names:
            buffer = self.get_buffer(name)
            if buffer.is_meta:
                buffer = torch.zeros((), dtype=buffer.dtype)
            moved = fn(torch.zeros((), dtype=buffer.dtype))
            if not moved.is_meta:
                dtype = torch.promote_types(moved.dtype, torch.float32)
                self.register_buffer(name, buffer.to(dtype))
        return self


def check_control(name: str, value: float | None) -> float:
    """``value`` as stored in the buffer; UltrathinkError if it is invalid."""
    if name not in LIMITS:
        raise UltrathinkError(f"there is no routing control {name!r}. {suggestion(name, LIMITS)}")
    if value is None and name == "capacity_factor":
        return float("inf")
    low, may_equal, high = LIMITS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_low = value == low and not may_equal
    if value is None or not is_number or not low <= value < high or is_low:
        above = f"{low:g} or more" if may_equal else f"above {low:g}"
        below = "" if high == float("inf") else f" and below {high:g}"
        raise UltrathinkError(f"the routing control {name} must be {above}{below}, not {value!r}.")
    return float(value)
