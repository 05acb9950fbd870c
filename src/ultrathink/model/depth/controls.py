"""The live capacity of depth routing, which can change during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ultrathink.config.depth import EIGHTHS, ModConfig, eighths_of
from ultrathink.core.errors import UltrathinkError


class DepthControls(nn.Module):
    """The capacity of all layers, and the step that random choices follow.

    The capacity decides shapes, so a compiled step has a graph for each: it is read from a number
    of Python, ``eighths``. The buffers are what checkpoints contain.
    """

    capacity_eighths: Tensor
    is_by_hand: Tensor
    step: Tensor

    def __init__(self, config: ModConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("capacity_eighths", "is_by_hand", "step"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.eighths = config.eighths
        self._is_by_hand = False
        self.register_load_state_dict_post_hook(_follow_buffer)  # type: ignore[no-untyped-call]
        self.reset()

    @property
    def capacity(self) -> float:
        """The share of tokens that go through, from 1/8 to 1."""
        return self.eighths / EIGHTHS

    def reset(self) -> None:
        """Set the configured capacity, at the beginning of its schedule."""
        self.step.zero_()
        self.is_by_hand.zero_()
        self._is_by_hand = False
        self._set(self.config.eighths_at(1, 1 << 30))

    def set(self, capacity: float) -> None:
        """Change the capacity from the next forward pass on, and end the schedule.

        It is rounded to eighths. Raises UltrathinkError for a value outside (0, 1].
        """
        self._set(check_capacity(capacity))
        self.is_by_hand.fill_(1)
        self._is_by_hand = True

    def begin_step(self, step: int, total_steps: int) -> None:
        """Follow the schedule in ``step`` (from 1) of a run of ``total_steps`` (0: unknown)."""
        self.step.fill_(step)
        if self.config.schedule and total_steps and not self._is_by_hand:
            self._set(self.config.eighths_at(step, total_steps))

    def _set(self, eighths: int) -> None:
        self.eighths = eighths
        self.capacity_eighths.fill_(eighths)


def _follow_buffer(controls: DepthControls, _: Any) -> None:
    if not controls.capacity_eighths.is_meta:
        controls.eighths = int(controls.capacity_eighths)
        controls._is_by_hand = bool(controls.is_by_hand)


def check_capacity(capacity: object) -> int:
    """``capacity`` in eighths; UltrathinkError if it is outside (0, 1]."""
    is_number = isinstance(capacity, int | float) and not isinstance(capacity, bool)
    if not is_number or not 0 < capacity <= 1:  # type: ignore[operator]
        raise UltrathinkError(
            f"the capacity of depth routing must be a share above 0, up to 1, not {capacity!r}."
        )
    return eighths_of(capacity)  # type: ignore[arg-type]
