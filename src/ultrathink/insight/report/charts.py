"""Coordinates of charts; ``page.html`` draws them as SVG that stretches, with its text in HTML.

A plot is 1000 units wide and high at any size on the screen. ``vector-effect`` keeps the width of
lines; text and marks, which must not stretch, are placed by per cents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ultrathink.insight.report.curves import (
    Series,
    round_values,
    scale_of,
    thinned,
    ticks_of,
)
from ultrathink.insight.report.markup import figure, units
from ultrathink.monitoring.plot import Scale
from ultrathink.monitoring.wording import short_number

Shape = Literal["line", "joined dots", "dots"]


@dataclass(frozen=True)
class Line:
    """A curve to draw; ``key`` names its style and its values under the pointer."""

    key: str
    label: str
    curve: Series
    shape: Shape = "line"
    is_raw: bool = False  # outliers may lie outside the linear scale
    is_aside: bool = False  # all of it may lie outside the linear scale


@dataclass(frozen=True)
class Span:
    """The steps from the left edge of every chart to the right one, or the values of an axis."""

    first: float
    last: float

    def share(self, step: float) -> float:
        """Where a step or a value lies: 0 at the left, 1 at the right."""
        if self.last <= self.first:
            return 0.5
        return min(1.0, max(0.0, (step - self.first) / (self.last - self.first)))

    def ticks(self) -> list[tuple[float, str]]:
        """Round steps for the axis, each with its label."""
        steps = [t for t in round_values(self.first, self.last, 9) if t == round(t)]
        return [(t, f"{t:,.0f}" if t < 1e6 else short_number(t)) for t in steps]


@dataclass(frozen=True)
class Layer:
    """The lines on one scale, with its grid."""

    kind: Literal["linear", "log"]
    ticks: list[tuple[str, float]]  # a label, and how high it stands, from 0 to 1
    paths: list[tuple[str, str]]  # the styles of a path, and what SVG calls its ``d``


@dataclass(frozen=True)
class Chart:
    """One plot with its axes."""

    name: str
    title: str
    lines: Sequence[Line]
    layers: Sequence[Layer]


def chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    span: Span,
    *,
    has_switch: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """The plot of ``lines``, None where there is nothing to draw.

    ``has_switch`` adds a logarithmic scale, where the values have one.
    """
    raw = [line.curve for line in lines if line.is_raw]
    whole = [line.curve for line in lines if not line.is_raw and not line.is_aside]
    linear = scale_of(raw, whole, from_zero=from_zero)
    if linear is None:
        return None
    layers = [_layer("linear", lines, span, linear)]
    log = scale_of([line.curve for line in lines], is_log=True) if has_switch else None
    if log is not None:
        layers.append(_layer("log", lines, span, log))
    return Chart(name, title, lines, layers)


def _layer(
    kind: Literal["linear", "log"], lines: Sequence[Line], span: Span, scale: Scale
) -> Layer:
    ticks = ticks_of(scale)
    digits = _digits(ticks)
    return Layer(
        kind,
        [(_label(tick, digits), scale.share(tick)) for tick in ticks],
        [path for line in lines for path in _paths(line, span, scale)],
    )


def _paths(line: Line, span: Span, scale: Scale) -> list[tuple[str, str]]:
    curve = thinned(line.curve)
    # Coordinates far outside the plot are clipped, to keep them short.
    heights = np.clip([scale.share(value) for value in curve.values.tolist()], -2.0, 3.0)
    places = [
        f"{units(span.share(step))} {units(1 - height)}" if np.isfinite(height) else None
        for step, height in zip(curve.steps, heights, strict=True)
    ]
    # A value between two gaps is a line without length, visible by its round ends.
    joined = "".join(
        f"{'L' if number and places[number - 1] else 'M'}{place}"
        for number, place in enumerate(places)
        if place
    )
    dots = "".join(f"M{place}h0" for place in places if place)
    style = f"line l-{line.key}"
    return {
        "line": [(style, joined)],
        "dots": [(f"{style} dots", dots)],
        "joined dots": [(style, joined), (f"{style} dots", dots)],
    }[line.shape]


def _label(value: float, digits: int) -> str:
    """A value of an axis; large ones are short."""
    if abs(value) >= 10_000:
        return short_number(value)
    if value and abs(value) < 1e-3:
        return figure(value, 3)
    return f"{value:,.{digits}f}"


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that distinguish all ticks."""
    for digits in range(6):
        if all(abs(round(tick, digits) - tick) <= 1e-9 * max(1.0, abs(tick)) for tick in ticks):
            return digits
    return 6
