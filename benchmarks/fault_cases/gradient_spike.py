"""Gradients that are far too large for three steps."""

from __future__ import annotations

from fault_injection import Fault, Moment
from torch import Tensor


class GradientSpike(Fault):
    """The gradients of three steps are a thousand times too large, in a direction of their own.

    Noise is added that has a thousand times their size, as of a reduction that read stale memory.
    """

    name = "gradient_spike"
    group = "gradient"
    num_steps = 3

    def on_gradient(self, name: str, gradient: Tensor, moment: Moment) -> Tensor:
        noise = gradient.new_empty(gradient.shape).normal_(generator=moment.generator)
        return gradient + noise * (1000 * gradient.norm() / noise.norm())


FAULT = GradientSpike
