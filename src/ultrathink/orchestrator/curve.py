"""The whole loss curve in a few hundred points, for runs of any length."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.windows import deviation, median

MOST_POINTS = 512
FIRST_BLOCK = 8  # observed steps per point; doubled whenever there are too many points

Floats = npt.NDArray[np.float64]


class Curve(Remembers):
    """Medians of blocks of steps; the common size of the blocks doubles as the run grows."""

    remembered = ("block_size", "_steps", "_levels", "_spreads", "_block")

    def __init__(self) -> None:
        self.block_size = FIRST_BLOCK
        self._steps: list[float] = []
        self._levels: list[float] = []
        self._spreads: list[float] = []
        self._block: list[list[float]] = []  # steps and values

    def __len__(self) -> int:
        return len(self._levels)

    @property
    def steps(self) -> Floats:
        """The mean step of each point."""
        return np.array(self._steps)

    @property
    def levels(self) -> Floats:
        """The median of each point."""
        return np.array(self._levels)

    @property
    def spread(self) -> float:
        """The robust standard deviation of single values around their last points."""
        return median(np.array(self._spreads[-32:]))

    def add(self, step: int, value: float) -> bool:
        """Add a value; returns whether it completed a point."""
        self._block.append([float(step), value])
        if len(self._block) < self.block_size:
            return False
        steps, values = np.array(self._block).T
        self._block = []
        self._steps.append(float(steps.mean()))
        self._levels.append(median(values))
        # Differences of neighbours have twice the variance, and hardly depend on a trend.
        self._spreads.append(deviation(np.diff(values)) / np.sqrt(2))
        if len(self._levels) > MOST_POINTS:
            self._merge()
        return True

    def cut(self, step: int) -> None:
        """Forget what lies beyond ``step``."""
        kept = sum(mean <= step for mean in self._steps)
        del self._steps[kept:], self._levels[kept:], self._spreads[kept:]
        self._block = [point for point in self._block if point[0] <= step]

    def _merge(self) -> None:
        def paired(values: list[float]) -> list[float]:
            return [sum(pair) / 2 for pair in zip(values[::2], values[1::2], strict=False)]

        if len(self._levels) % 2:  # the odd block is reopened, with its median for all its values
            self._block = [[self._steps[-1], self._levels[-1]]] * self.block_size
        self._steps, self._levels = paired(self._steps), paired(self._levels)
        self._spreads = paired(self._spreads)
        self.block_size *= 2
