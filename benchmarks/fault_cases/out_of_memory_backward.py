"""The backward pass runs out of memory."""

from __future__ import annotations

from typing import Any

import torch
from fault_injection import Moment
from fault_memory import OutOfMemoryFault, need
from torch import Tensor


class _Needing(torch.autograd.Function):
    """The identity, whose backward pass needs memory."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, num_sequences: int) -> Tensor:
        ctx.num_sequences = num_sequences
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        need(ctx.num_sequences)
        return gradients[0], None


class OutOfMemoryInBackward(OutOfMemoryFault):
    """The backward pass of a whole batch does not fit any more; that of half of it does."""

    name = "out_of_memory_backward"

    def __init__(self) -> None:
        super().__init__()
        self._num_sequences = 0

    def on_forward(self, num_sequences: int, moment: Moment) -> None:
        self.limit()
        self._num_sequences = num_sequences

    def on_loss(self, loss: Tensor, moment: Moment) -> Tensor:
        needing: Tensor = _Needing.apply(loss, self._num_sequences)
        return needing


FAULT = OutOfMemoryInBackward
