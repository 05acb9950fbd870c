"""The learning rate is thirty times what it should be."""

from __future__ import annotations

from fault_injection import Fault, Moment


class LearningRateTimes30(Fault):
    """From here on the schedule gives thirty times the rate, as after a slip in a configuration."""

    name = "lr_x30"
    group = "loss"
    num_steps = None

    def lr_factor(self, moment: Moment) -> float:
        return 30.0


FAULT = LearningRateTimes30
