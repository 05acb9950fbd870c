"""Curves printed below a report's lines: dots with an axis on a terminal, bars elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from ultrathink.monitoring.plot import Point, Scale, bars, draw
from ultrathink.monitoring.report import Cell, Report

HEIGHT = 9  # rows
_MIN_WIDTH = 20


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
