"""ZClip: a norm that lies far above its moving average is clipped (arXiv:2504.02507).

With z = (norm - mean) / deviation above the threshold, the norm is cut to
mean + threshold² · deviation / z: the farther out, the nearer to the mean. Mean and variance are
exponential averages of norms after clipping. They begin as those of the first 25 steps.
"""

from __future__ import annotations

import math
import statistics

from ultrathink.core.protocols import State
from ultrathink.training.stepping import Verdict

ALPHA = 0.97
THRESHOLD = 2.5
WARMUP_STEPS = 25
EPS = 1e-6


class ZClip:
    """Clips by the z-score of the gradient norm; with the paper's alpha = 0.97 and z = 2.5."""

    def __init__(self) -> None:
        self.first: list[float] = []  # norms, until there are enough to begin with
        self.mean = 0.0
        self.variance = 0.0

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        if len(self.first) < WARMUP_STEPS:
            self.first.append(grad_norm)
            self.mean = statistics.fmean(self.first)
            self.variance = statistics.pvariance(self.first)
            return Verdict()
        deviation = math.sqrt(self.variance)
        z = (grad_norm - self.mean) / (deviation + EPS)
        clip = None
        if z > THRESHOLD:
            clip = self.mean + THRESHOLD * deviation * THRESHOLD / z
        kept = grad_norm if clip is None else clip
        self.mean = ALPHA * self.mean + (1 - ALPHA) * kept
        self.variance = ALPHA * self.variance + (1 - ALPHA) * (kept - self.mean) ** 2
        return Verdict(clip=clip)

    def state_dict(self) -> State:
        return {"first": list(self.first), "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: State) -> None:
        self.first, self.mean, self.variance = (
            state["first"],
            state["mean"],
            state["variance"],
        )


CONTROLLER = ZClip
