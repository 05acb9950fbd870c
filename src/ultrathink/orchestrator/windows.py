"""Statistics over the last values that a spike does not poison: medians and median deviations.

The median absolute deviation times 1.4826 estimates the standard deviation of a normal variable;
up to half of the values may be anything (Rousseeuw & Croux, 1993, JASA 88:1273).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ultrathink.core.protocols import State

LARGEST = 1e100  # so that sums and squares of values stay finite
NORMAL = 1.4826  # the median absolute deviation of a standard normal variable is 1 / 1.4826


class Window:
    """The last ``size`` values of a signal, and what is usual among them."""

    def __init__(self, size: int) -> None:
        self.size = size
        # A ring written twice, one copy behind the other: the last values always lie in one piece.
        self._ring = np.zeros(2 * size)
        self._end = 0  # of the last values, in the second copy once the ring is full
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The values, the oldest first."""
        return self._last(self._count).copy()

    def add(self, value: float) -> None:
        """Add the newest value; the oldest is forgotten once the window is full."""
        assert math.isfinite(value), "a window holds finite values"
        place = self._end % self.size
        self._ring[place] = self._ring[place + self.size] = min(max(value, -LARGEST), LARGEST)
        self._end = place + 1
        self._count = min(self._count + 1, self.size)

    def extend(self, values: Iterable[float]) -> None:
        """Add several values, the newest last."""
        for value in values:
            self.add(value)

    def clear(self) -> None:
        """Forget all values."""
        self._end = self._count = 0

    def drop_last(self, count: int) -> None:
        """Forget the ``count`` newest values."""
        kept = self.values[: max(0, self._count - count)]
        self.clear()
        self.extend(kept)

    def median(self, last: int | None = None) -> float:
        """The median of the ``last`` values, or of all."""
        return median(self._last(self._count if last is None else min(last, self._count)))

    def deviation(self) -> float:
        """The robust standard deviation of all values."""
        return deviation(self._last(self._count))

    def _last(self, count: int) -> npt.NDArray[np.float64]:
        """The last values where they lie: not to be kept, since they will be written over."""
        end = self._end + self.size if self._count == self.size else self._end
        return self._ring[end - count : end]

    def state_dict(self) -> State:
        """What to remember over a restart."""
        return {"values": self.values.tolist()}

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned."""
        values: dict[str, Any] = dict(state)
        self.clear()
        self.extend(values["values"][-self.size :])


def median(values: npt.NDArray[np.float64]) -> float:
    """The median; of none it is not a number."""
    count = len(values)
    if count == 0:
        return math.nan
    middle = count // 2  # np.median does the same in five times the time for so few
    parted = values.copy()
    parted.partition((middle - 1, middle) if count % 2 == 0 else middle)
    if count % 2:
        return float(parted[middle])
    return float(parted[middle - 1] + parted[middle]) / 2


def deviation(values: npt.NDArray[np.float64]) -> float:
    """The robust standard deviation; of fewer than two values it is not a number."""
    if len(values) < 2:
        return math.nan
    return NORMAL * median(np.abs(values - median(values)))
