"""Steps whose loss or gradient norm lies 6 deviations from the mean of the last 128 are left out.

As the skip-step optimizers of OLMo-core do (https://github.com/allenai/OLMo-core): both directions
count, it begins with half a window, and left-out steps enter the window like any other.
"""

from __future__ import annotations

import statistics
from collections import deque

from ultrathink.core.protocols import State
from ultrathink.training.stepping import Verdict

WINDOW = 128
SIGMAS = 6.0
FEWEST = WINDOW // 2


class SkipStep:
    """Leaves out a step that is unlike the last ones in its loss or its gradient norm."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        skip = len(self.losses) + 1 >= FEWEST and (
            _is_far(step_loss, self.losses) or _is_far(grad_norm, self.norms)
        )
        self.losses.append(step_loss)
        self.norms.append(grad_norm)
        return Verdict(skip=skip)

    def state_dict(self) -> State:
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def load_state_dict(self, state: State) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.norms = deque(state["norms"], maxlen=WINDOW)


def _is_far(value: float, before: deque[float]) -> bool:
    return abs(value - statistics.fmean(before)) > SIGMAS * statistics.stdev(before)


CONTROLLER = SkipStep
