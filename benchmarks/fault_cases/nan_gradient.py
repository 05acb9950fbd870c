"""Gradients that are no numbers."""

from __future__ import annotations

import math

from fault_injection import Fault, Moment
from torch import Tensor


class NanGradient(Fault):
    """One number in the gradient of one matrix is NaN in each of twenty steps."""

    name = "nan_gradient"
    group = "gradient"
    num_steps = 20

    def on_gradient(self, name: str, gradient: Tensor, moment: Moment) -> Tensor:
        matrices = [key for key, weight in moment.model.named_parameters() if weight.ndim == 2]
        if name != matrices[-1]:
            return gradient
        broken = gradient.clone()
        broken.view(-1)[0] = math.nan
        return broken


FAULT = NanGradient
