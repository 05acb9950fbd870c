"""Curves drawn with characters: lines of dots where there is colour, else a row of bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ultrathink.monitoring.report import Cell, Report

Point = tuple[float, float]

HEIGHT = 9  # rows of dots
_MIN_WIDTH = 20

_BARS = "▁▂▃▄▅▆▇█"
# A braille character is two dots wide and four high; the bits of each dot, from the top.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800


@dataclass(frozen=True)
class Scale:
    """The values from the foot of a plot to its top."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(cls, curves: Sequence[Sequence[Point]]) -> Scale | None:
        """The span of all finite values, logarithmic above zero; None where there is none."""
        values = [y for curve in curves for _, y in curve if math.isfinite(y)]
        return cls(min(values), max(values), min(values) > 0) if values else None

    def share(self, value: float) -> float:
        """How high ``value`` lies: 0 at the foot, 1 at the top; NaN where it has no place."""
        low, high = self.low, self.high
        if self.is_log:
            if not value > 0:
                return math.nan
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.0


@dataclass(frozen=True)
class Dots:
    """A drawn character, and the number of its curve (the last drawn)."""

    character: str
    curve: int | None


def draw(
    curves: Sequence[Sequence[Point]], scale: Scale, *, end: float, width: int, height: int
) -> list[list[Dots]]:
    """``height`` rows of ``width`` characters with all curves, ``x`` from 0 to ``end``.

    Points in the same column of dots are averaged.
    """
    bits = [[0] * width for _ in range(height)]
    owners: list[list[int | None]] = [[None] * width for _ in range(height)]
    for number, curve in enumerate(curves):
        for column, row in _dots_of(curve, scale, end, 2 * width, 4 * height):
            bits[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
            owners[row // 4][column // 2] = number
    return [
        [Dots(chr(_BLANK | value), owner) for value, owner in zip(*row, strict=True)]
        for row in zip(bits, owners, strict=True)
    ]


def bars(curve: Sequence[Point], scale: Scale, *, end: float, width: int) -> str:
    """One row of bars for a curve, each as high as the last point at or before it."""
    heights = _column_means(curve, end, width)
    while heights and heights[-1] is None:
        heights.pop()
    row = ""
    for height in heights:
        if height is not None:
            row += _BARS[round(scale.share(height) * (len(_BARS) - 1))]
        else:
            row += row[-1:] or " "
    return row


def _dots_of(
    curve: Sequence[Point], scale: Scale, end: float, columns: int, rows: int
) -> list[tuple[int, int]]:
    """The dots of a curve as (column, row), its points joined by lines."""
    means = _column_means(curve, end, columns)
    points = [
        (column, round((1 - scale.share(value)) * (rows - 1)))
        for column, value in enumerate(means)
        if value is not None
    ]
    dots = points[:1]
    for (column, row), (next_column, next_row) in pairwise(points):
        steps = max(next_column - column, abs(next_row - row))
        dots += [
            (
                column + round(part * (next_column - column) / steps),
                row + round(part * (next_row - row) / steps),
            )
            for part in range(1, steps + 1)
        ]
    return dots


def _column_means(curve: Sequence[Point], end: float, columns: int) -> list[float | None]:
    parts: list[list[float]] = [[] for _ in range(columns)]
    for x, y in curve:
        if 0 <= x <= end and math.isfinite(y):
            parts[min(columns - 1, int(x / end * columns))].append(y)
    return [math.fsum(part) / len(part) if part else None for part in parts]


class PlotView:
    """Prints curves on one scale, ``x`` from 0 to ``end``, at most ``max_width`` columns wide."""

    def __init__(self, report: Report, scale: Scale, *, end: float, max_width: int) -> None:
        self.report = report
        self.low, self.high = f"{scale.low:.3f}", f"{scale.high:.3f}"
        self.margin = max(len(self.low), len(self.high)) + 2
        room = report.width - self.margin - 4
        self.width = max(_MIN_WIDTH, min(max_width, room))
        self._scale = scale
        self._end = end

    def bars(self, curve: Sequence[Point], *, width: int | None = None) -> str:
        """A curve as one row of bars, for plain text."""
        return bars(curve, self._scale, end=self._end, width=width or self.width)

    def print_dots(self, curves: Sequence[Sequence[Point]], colors: Sequence[str]) -> None:
        """All curves as dots, each in its color, with the scale at the left."""
        rows = draw(curves, self._scale, end=self._end, width=self.width, height=HEIGHT)
        for number, row in enumerate(rows):
            label = {0: self.high, len(rows) - 1: self.low}.get(number, "")
            cells = [
                Cell(dots.character, "" if dots.curve is None else colors[dots.curve])
                for dots in row
            ]
            self.report.line(Cell(f"{label:>{self.margin}} │", "dim"), *cells)

    def print_foot(self, cells: Sequence[str | Cell]) -> None:
        """The axis below the dots: what stands in its columns."""
        self.report.line(Cell(f"{'':>{self.margin}} └", "dim"), *cells)
