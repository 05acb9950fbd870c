"""Charts as SVG that stretches, with its text beside it in HTML, so that it stays legible.

A plot's coordinates run from 0 to 1000 both ways, however wide it is on the screen: lines keep
their width by ``vector-effect``, and everything that must not be stretched is placed by per cents.
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
from ultrathink.insight.report.markup import Html, figure, html, tag
from ultrathink.monitoring.plot import Scale
from ultrathink.monitoring.wording import short_number

SIZE = 1000.0  # of a plot, in its own units


@dataclass(frozen=True)
class Line:
    """A curve to draw; ``key`` names its style and its values under the pointer."""

    key: str
    label: str
    curve: Series
    shape: Literal["line", "joined dots", "dots"] = "line"
    is_raw: bool = False  # its farthest values need not be inside
    is_aside: bool = False  # on the linear scale, none of it need be


@dataclass(frozen=True)
class Span:
    """The steps from the left edge of every chart to the right one."""

    first: float
    last: float

    def share(self, step: float) -> float:
        """Where a step lies: 0 at the left, 1 at the right."""
        if self.last <= self.first:
            return 0.5
        return min(1.0, max(0.0, (step - self.first) / (self.last - self.first)))


def chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    span: Span,
    *,
    behind: Html | None = None,
    above: Html | None = None,
    below: Html | None = None,
    has_switch: bool = False,
    from_zero: bool = False,
) -> Html | None:
    """One plot with its axes, None where there is nothing to draw.

    ``behind`` is drawn below the lines in the plot's own units; ``above`` stands over the plot and
    ``below`` under it; ``has_switch`` adds a logarithmic scale.
    """
    raw = [line.curve for line in lines if line.is_raw]
    whole = [line.curve for line in lines if not line.is_raw and not line.is_aside]
    linear = scale_of(raw, whole, from_zero=from_zero)
    if linear is None:
        return None
    log = scale_of([line.curve for line in lines], is_log=True) if has_switch else None
    layers = [_layer(lines, span, linear, "linear")]
    if log is not None:
        layers.append(_layer(lines, span, log, "log"))
    steps = step_ticks(span)
    ticks = [tag("path", d=f"M{_x(span, step)} 0V{SIZE:.0f}", class_="grid") for step, _ in steps]
    plot = tag(
        "div",
        tag(
            "svg",
            behind,
            ticks,
            [drawn for drawn, _ in layers],
            viewBox=f"0 0 {SIZE:.0f} {SIZE:.0f}",
            preserveAspectRatio="none",
            aria_hidden="true",
        ),
        [labels for _, labels in layers],
        class_="plot",
        data_plot=name,
        tabindex="0",
        role="img",
        aria_label=f"{title} over steps {figure(span.first, 9)} to {figure(span.last, 9)}",
    )
    legend = [
        tag("span", tag("i", class_=f"key k-{line.key}"), line.label, class_="entry")
        for line in lines
        if len(lines) > 1 and line.label
    ]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("span", legend, class_="legend")),
        above,
        plot,
        below,
        step_axis(span, steps),
        class_=f"chart c-{name}",
    )


def _layer(lines: Sequence[Line], span: Span, scale: Scale, kind: str) -> tuple[Html, Html]:
    """The lines on one scale with its grid, and the labels of the grid."""
    ticks = ticks_of(scale)
    heights = [scale.share(tick) for tick in ticks]
    grid = [tag("path", d=f"M0 {_y(h)}H{SIZE:.0f}", class_="grid") for h in heights]
    drawn = tag("g", grid, [_path(line, span, scale) for line in lines], class_=f"s-{kind}")
    digits = _digits(ticks)
    labels = [
        tag("span", label(tick, digits), class_=f"y s-{kind}", style=f"bottom:{100 * h:.2f}%")
        for tick, h in zip(ticks, heights, strict=True)
    ]
    return drawn, html(labels)


def _path(line: Line, span: Span, scale: Scale) -> Html:
    curve = thinned(line.curve)
    # What lies far outside is cut at an edge beyond the plot: coordinates stay small.
    heights = np.clip([scale.share(value) for value in curve.values.tolist()], -2.0, 3.0)
    places = [
        f"{_x(span, step)} {_y(height)}" if np.isfinite(height) else None
        for step, height in zip(curve.steps, heights, strict=True)
    ]
    style = f"line l-{line.key}"
    dots = tag("path", d="".join(f"M{p}h0" for p in places if p), class_=f"{style} dots")
    if line.shape == "dots":
        return dots
    joined = [
        f"{'L' if number and places[number - 1] else 'M'}{place}"
        for number, place in enumerate(places)
        if place
    ]
    # A value between two that are none is a line without length, which its round ends show.
    path = tag("path", d="".join(joined), class_=style)
    return path if line.shape == "line" else html(path, dots)


def _x(span: Span, step: float) -> str:
    return f"{SIZE * span.share(step):.1f}"


def _y(height: float) -> str:
    return f"{SIZE * (1 - height):.1f}"


def step_ticks(span: Span) -> list[tuple[float, bool]]:
    """Round steps for the axis, and whether a narrow screen has room for each."""
    ticks = [t for t in round_values(span.first, span.last, 9) if t == round(t)]
    return [(tick, number % 2 == 0) for number, tick in enumerate(ticks)]


def step_axis(span: Span, steps: Sequence[tuple[float, bool]]) -> Html:
    """Round steps below a picture that spans all of them."""
    labels = []
    for step, is_wide in steps:
        share = span.share(step)
        edge = " right" if share > 0.96 else " left" if share < 0.03 else ""
        labels.append(
            tag(
                "span",
                f"{step:,.0f}" if step < 1e6 else short_number(step),
                class_=f"x{edge}{'' if is_wide else ' wide'}",
                style=f"left:{100 * share:.2f}%",
            )
        )
    return tag("div", labels, tag("span", "step", class_="unit"), class_="steps")


def label(value: float, digits: int) -> str:
    """A value of an axis; large ones are short."""
    if abs(value) >= 10_000:
        return short_number(value)
    if value and abs(value) < 1e-3:
        return figure(value, 3)
    return f"{value:,.{digits}f}"


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that tell all ticks apart."""
    for digits in range(6):
        if all(abs(round(tick, digits) - tick) <= 1e-9 * max(1.0, abs(tick)) for tick in ticks):
            return digits
    return 6


# -- intervals -------------------------------------------------------------------------------------


def interval(
    low: float, middle: float, high: float, reference: float, ends: tuple[float, float], kind: str
) -> Html:
    """An interval with its middle, and a line at ``reference``, between two ``ends``."""
    least, most = ends
    width = (most - least) or 1.0

    def place(value: float) -> float:
        return min(100.0, max(0.0, 100 * (value - least) / width))

    return tag(
        "span",
        tag("i", class_="zero", style=f"left:{place(reference):.2f}%"),
        tag(
            "i",
            class_="reach",
            style=f"left:{place(low):.2f}%;width:{place(high) - place(low):.2f}%",
        ),
        tag("i", class_="middle", style=f"left:{place(middle):.2f}%"),
        class_=f"interval {kind}",
        aria_hidden="true",
    )


def ends_of(values: Sequence[float]) -> tuple[float, float]:
    """The span of ``values`` with room to either side."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin
