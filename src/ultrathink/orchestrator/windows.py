"""Robust statistics of the last values: medians and median absolute deviations.

The median absolute deviation times 1.4826 estimates the standard deviation of a normal variable;
up to half of the values may be outliers (Rousseeuw & Croux, 1993, JASA 88:1273).
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
    """The last ``size`` values of a signal, with their median and deviation."""

    def __init__(self, size: int) -> None:
        self.size = size
        # A ring buffer stored twice in sequence, so that the last values are always contiguous.
        self._ring = np.zeros(2 * size)
        self._end = 0  # end of the last values, in the second copy once the ring is full
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The values, the oldest first."""
        return self._last(self._count).copy()

    def add(self, value: float) -> None:
        """Add the newest value; a full window drops the oldest."""
        assert math.isfinite(value), "a window holds finite values"
        place = self._end % self.size
        self._ring[place] = self._ring[place + self.size] = min(max(value, -LARGEST), LARGEST)
        self._end = place + 1
        self._count = min(self._count + 1, self.size)

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self.add(value)

    def clear(self) -> None:
        self._end = self._count = 0

    def drop_last(self, count: int) -> None:
        kept = self.values[: max(0, self._count - count)]
        self.clear()
        self.extend(kept)

    def median(self, last: int | None = None) -> float:
        """The median of the ``last`` values, or of all."""
        return median(self._last(self._count if last is None else min(last, self._count)))

    def deviation(self) -> float:
        return deviation(self._last(self._count))

    def _last(self, count: int) -> npt.NDArray[np.float64]:
        """A view of the last values, which will be overwritten."""
        end = self._end + self.size if self._count == self.size else self._end
        return self._ring[end - count : end]

    def state_dict(self) -> State:
        return {"values": self.values.tolist()}

    def load_state_dict(self, state: State) -> None:
        values: dict[str, Any] = dict(state)
        self.clear()
        self.extend(values["values"][-self.size :])


def median(values: npt.NDArray[np.float64]) -> float:
    """The median; NaN if there are no values."""
    count = len(values)
    if count == 0:
        return math.nan
    middle = count // 2  # five times faster than np.median for few values
    parted = values.copy()
    parted.partition((middle - 1, middle) if count % 2 == 0 else middle)
    if count % 2:
        return float(parted[middle])
    return float(parted[middle - 1] + parted[middle]) / 2


def deviation(values: npt.NDArray[np.float64]) -> float:
    """The robust standard deviation; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return NORMAL * median(np.abs(values - median(values)))
