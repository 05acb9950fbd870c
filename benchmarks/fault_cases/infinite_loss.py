"""The loss is infinite for some steps."""

from __future__ import annotations

import math

from fault_injection import Fault, Moment
from torch import Tensor


class InfiniteLoss(Fault):
    """The loss overflows in three steps, as in a number format that is too narrow."""

    name = "infinite_loss"
    group = "loss"
    num_steps = 3

    def on_loss(self, loss: Tensor, moment: Moment) -> Tensor:
        return loss * math.inf


FAULT = InfiniteLoss
