"""The learning rate is ten times what it should be."""

from __future__ import annotations

from fault_injection import Fault, Moment


class LearningRateTimes10(Fault):
    """From here on the schedule gives ten times the rate, as after a slip in a configuration."""

    name = "lr_x10"
    group = "loss"
    num_steps = None

    def lr_factor(self, moment: Moment) -> float:
        return 10.0


FAULT = LearningRateTimes10
