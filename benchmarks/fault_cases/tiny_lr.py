"""The learning rate is so small that nothing is learned any more."""

from __future__ import annotations

from fault_injection import Fault, Moment


class TinyLearningRate(Fault):
    """From here on the schedule gives a hundredth of the rate: the loss stays on a plateau."""

    name = "tiny_lr"
    group = "loss"
    num_steps = None

    def lr_factor(self, moment: Moment) -> float:
        return 0.01


FAULT = TinyLearningRate
