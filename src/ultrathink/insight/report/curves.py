"""Curves: thinned with their extremes kept, smoothed, and placed on a scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ultrathink.monitoring.plot import Scale

Floats = npt.NDArray[np.float64]

MOST_POINTS = 2000
_BLOCKS = 400  # medians of a smoothed curve
_SPAN = 4  # medians to either side in a running mean; fewer where there are few medians
_FEWEST = 24  # points below which a curve is not smoothed
_START = 40  # the first 1/40 of the points is the first fall, which would take most of the height
_OUTLYING = 0.4  # per cent of raw values on either side that may lie outside


@dataclass(frozen=True)
class Series:
    """Values over steps, ``[N]`` each; NaN for a value that is missing or not finite."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Series:
        """The curve through ``points``, pairs of a step and a value."""
        array = np.array(points, dtype=np.float64).reshape(-1, 2)
        return cls(array[:, 0], array[:, 1])

    @property
    def finite(self) -> Series:
        """Its points with a finite value."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


def thinned(curve: Series, most: int = MOST_POINTS) -> Series:
    """At most about ``most`` points: of each stretch its lowest and highest, and both ends."""
    count = len(curve)
    if count <= most:
        return curve
    edges = np.linspace(0, count, max(2, most // 2) + 1).astype(int)
    kept = {0, count - 1}
    for begin, end in pairwise(edges):
        part = curve.values[begin:end]
        bad = np.flatnonzero(~np.isfinite(part))
        if len(bad) < len(part):
            kept |= {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
        if len(bad):  # a gap stays one
            kept.add(begin + int(bad[0]))
    chosen = np.array(sorted(kept))
    return Series(curve.steps[chosen], curve.values[chosen])


def smoothed(curve: Series) -> Series:
    """Medians of blocks of neighbours, then running means of these; empty for a short curve."""
    curve = curve.finite
    if len(curve) < _FEWEST:
        return Series(np.empty(0), np.empty(0))
    blocks = np.array_split(np.arange(len(curve)), min(_BLOCKS, len(curve) // 2))
    steps = np.array([curve.steps[block].mean() for block in blocks])
    levels = np.array([np.median(curve.values[block]) for block in blocks])
    # The span is smaller at both ends, so that the steep start is not flattened.
    sums = np.concatenate([[0.0], np.cumsum(levels)])
    places = np.arange(len(levels))
    span = min(_SPAN, max(1, len(levels) // 16))
    begin = places - np.minimum(places, span)
    end = np.minimum(places + np.minimum(places, span), len(levels) - 1) + 1
    means = (sums[end] - sums[begin]) / (end - begin)
    return Series(steps, means)


def at(curve: Series, step: float) -> float | None:
    """The value at ``step``, between the points beside it; None for an empty curve."""
    known = curve.finite
    if not len(known):
        return None
    return float(np.interp(step, known.steps, known.values))


def ticks_of(scale: Scale, most: int = 6) -> list[float]:
    """Round values between the foot and the top of a scale."""
    return (_log_ticks if scale.is_log else round_values)(scale.low, scale.high, most)


def scale_of(
    raw: Sequence[Series],
    whole: Sequence[Series] = (),
    *,
    is_log: bool = False,
    from_zero: bool = False,
) -> Scale | None:
    """The scale that curves are drawn on; None where there is nothing to draw.

    Linear: ``raw`` curves without their first fall and outliers, ``whole`` curves without their
    first fall. Logarithmic: everything; None where a value is not above zero.
    """
    if is_log:
        values = np.concatenate([c.finite.values for c in (*raw, *whole)] or [np.empty(0)])
        if not len(values) or values.min() <= 0:
            return None
        ratio = max(float(values.max() / values.min()), 1.02) ** 0.04
        return Scale(float(values.min()) / ratio, float(values.max()) * ratio, True)
    ends: list[float] = []
    for curves, outlying in ((raw, _OUTLYING), (whole, 0.0)):
        for curve in curves:
            values = curve.finite.values
            if len(values):
                values = values[len(values) // _START :]
                ends += np.percentile(values, [outlying, 100 - outlying]).tolist()
    if not ends:
        return None
    low, high = min(ends), max(ends)
    is_from_zero = from_zero and low >= 0
    margin = 0.05 * (high - (0.0 if is_from_zero else low)) or 0.05 * abs(high) or 1.0
    return Scale(0.0 if is_from_zero else low - margin, high + margin)


def round_values(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round values from ``low`` to ``high``, evenly spaced."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    stride = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if span / (m * power) <= most)
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    # Twelve digits hide rounding errors; ticks that are equal then are one.
    ticks = (float(f"{number * stride:.12g}") for number in range(first, last + 1))
    return list(dict.fromkeys(ticks)) or [low]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    for parts in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
        powers = range(begin, end + 1)
        ticks = [float(f"{part * 10.0**p:.6g}") for p in powers for part in parts]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= most:
            break
    if len(inside) > most:  # many powers of ten
        inside = inside[:: -(-len(inside) // most)]
    return inside if len(inside) >= 2 else round_values(low, high, most)
