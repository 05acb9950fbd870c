"""A picture of a log: the loss with events and phases, and the gradient norm below it.

Needs matplotlib, which is in the extra ``plot``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrathink.core.errors import MissingDependencyError
from ultrathink.insight.log_analysis import Course, LogAnalysis, Point, without_start
from ultrathink.insight.report.curves import Series, smoothed
from ultrathink.orchestrator.events import SEVERITIES, Event
from ultrathink.orchestrator.phases import (
    CONVERGING,
    DIVERGING,
    INITIALIZATION,
    PLATEAU,
    VOLATILE,
    Phase,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLORS = {
    INITIALIZATION: "#e4e4e4",
    VOLATILE: "#fbe3b0",
    CONVERGING: "#d9efd6",
    PLATEAU: "#d4e3f5",
    DIVERGING: "#f6cccc",
}
SEVERITY_COLORS = {
    "info": "#8a8a8a",
    "low": "#3a87ad",
    "medium": "#e08a00",
    "high": "#d42020",
    "critical": "#7a0050",
}
_LINE_COLORS = ("#1f4e79", "#7a4b94", "#2b7a5b", "#a0522d", "#555555", "#b03060")
_MAX_LABELS = 6
_EDGE = 0.06  # of the width, beyond the last step
_MANY = 256  # points, of which a smoothed line is drawn
_MAX_MARKS = 400


def require_matplotlib() -> None:
    """MissingDependencyError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "a picture needs the package matplotlib; install it with: "
            'pip install "ultrathink[plot]"'
        ) from None


def draw_picture(analysis: LogAnalysis, path: Path) -> None:
    """Write the picture of what was found to ``path``; its suffix says the kind."""
    require_matplotlib()
    from matplotlib.figure import Figure

    has_norm = any("grad_norm" in course.curves for course in analysis.courses)
    # A figure of its own, without pyplot, needs no screen.
    figure = Figure(figsize=(12, 6.8 if has_norm else 5.2), dpi=130, layout="constrained")
    heights = [3.2, 1] if has_norm else [1]
    grid = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    axes: list[Axes] = list(grid[:, 0])
    _draw_losses(axes[0], analysis)
    if has_norm:
        _draw_norms(axes[1], analysis)
    for axis in axes:
        if not analysis.has_several:  # bands of several runs would lie on each other
            _draw_phases(axis, [phase for _, phase in analysis.phases()])
    events = [event for _, event in analysis.events()]
    _draw_events(axes[0], events, analysis.courses)
    _finish(figure, axes, analysis, events)
    figure.savefig(path)


def _draw_losses(axis: Axes, analysis: LogAnalysis) -> None:
    for number, course in enumerate(analysis.courses):
        color = _LINE_COLORS[number % len(_LINE_COLORS)]
        name = f"{course.name}: " if analysis.has_several else ""
        for undone in course.undone:
            axis.plot(*_xy(undone), color="#999999", lw=0.8, ls=":")
        losses = course.curves.get("loss", [])
        steps, values = _xy(losses)
        if len(losses) > _MANY:
            smooth = smoothed(Series.of(losses))
            axis.plot(steps, values, color=color, lw=0.6, alpha=0.45)
            axis.plot(
                smooth.steps, smooth.values, color=color, lw=1.6, label=f"{name}training loss"
            )
        elif losses:
            axis.plot(
                steps, values, color=color, lw=1.3, marker=_marker(values), ms=3,
                label=f"{name}training loss",
            )  # fmt: skip
        if course.curves.get("val_loss"):
            steps, values = _xy(course.curves["val_loss"])
            axis.plot(
                steps, values, color="#c0392b", lw=1.2, marker="o", ms=2.5,
                label=f"{name}validation loss",
            )  # fmt: skip
    shown = _draw_forecast(axis, analysis)
    for course in analysis.courses:
        for name in ("loss", "val_loss"):
            shown += [loss for _, loss in without_start(course.curves.get(name, []))]
    _scale(axis, shown)
    axis.set_ylabel("loss (nats)")


def _draw_forecast(axis: Axes, analysis: LogAnalysis) -> list[float]:
    """Draw what is predicted, at the edge where its step lies far beyond; the losses drawn."""
    ahead = analysis.forecast()
    if ahead is None or ahead.step <= ahead.at_step:
        return []
    first = min(analysis.courses[-1].steps)
    last = max(analysis.courses[-1].steps)
    place = min(float(ahead.step), last + _EDGE * (last - first))
    spread = [[max(0.0, ahead.loss - ahead.low)], [max(0.0, ahead.high - ahead.loss)]]
    axis.errorbar(
        [place], [ahead.loss], yerr=spread, color="#333333", fmt="D", ms=4, capsize=4,
        label=f"forecast for step {ahead.step:,}, {ahead.level:.0%} interval",
    )  # fmt: skip
    return [ahead.low, ahead.high]


def _draw_norms(axis: Axes, analysis: LogAnalysis) -> None:
    norms: list[float] = []
    for number, course in enumerate(analysis.courses):
        steps, values = _xy(course.curves.get("grad_norm", []))
        color = _LINE_COLORS[number % len(_LINE_COLORS)]
        axis.plot(steps, values, color=color, lw=0.7, marker=_marker(values), ms=3)
        norms += list(values)
    _scale(axis, norms)
    axis.set_ylabel("gradient norm")


def _draw_phases(axis: Axes, phases: Sequence[Phase]) -> None:
    for number, phase in enumerate(phases):
        end = phase.to_step
        if number + 1 < len(phases):  # bands touch
            end = max(end, phases[number + 1].from_step)
        axis.axvspan(
            phase.from_step, end, color=PHASE_COLORS[phase.phase], lw=0, alpha=0.75, zorder=0
        )


def _draw_events(axis: Axes, events: Sequence[Event], courses: Sequence[Course]) -> None:
    """Alarms as lines with a mark at the top, the gravest with their kinds; others at the foot."""
    gravest = sorted(events, key=lambda event: -SEVERITIES.index(event.severity))[:_MAX_MARKS]
    for event in sorted(gravest, key=lambda event: SEVERITIES.index(event.severity)):
        color = SEVERITY_COLORS[event.severity]
        place = axis.get_xaxis_transform()  # x in steps, y in shares of the height
        if not event.is_alarm:
            axis.plot([event.step], [0.015], "|", color=color, ms=7, transform=place, zorder=4)
            continue
        if event.to_step > event.step:
            axis.axvspan(event.step, event.to_step, color=color, alpha=0.12, lw=0, zorder=1)
        axis.axvline(event.step, color=color, lw=0.9, alpha=0.8, zorder=2)
        axis.plot([event.step], [0.985], "v", color=color, ms=7, transform=place, zorder=5)
    labelled = sorted(
        [event for event in gravest if event.is_alarm][:_MAX_LABELS], key=lambda event: event.step
    )
    for number, event in enumerate(labelled):
        axis.annotate(
            f"{event.kind.replace('_', ' ')}\nstep {event.step:,}",
            (event.step, 0.94 - 0.09 * number),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=8,
            color=SEVERITY_COLORS[event.severity],
            va="top",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
            zorder=6,
        )


def _finish(
    figure: Figure, axes: Sequence[Axes], analysis: LogAnalysis, events: Sequence[Event]
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = list(axes[0].get_legend_handles_labels()[0])
    handles += [
        Line2D([], [], color=SEVERITY_COLORS[s], marker="v" if number >= 2 else "|", ls="", label=s)
        for number, s in enumerate(SEVERITIES)
        if any(event.severity == s for event in events)
    ]
    shown = [] if analysis.has_several else analysis.phases()
    present = {phase.phase for _, phase in shown}
    handles += [
        Patch(color=color, label=phase) for phase, color in PHASE_COLORS.items() if phase in present
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3 if analysis.has_several else 6,
        fontsize=8, frameon=False,
    )  # fmt: skip
    alarms = sum(event.is_alarm for event in events)
    name = "/".join(analysis.log.path.parts[-2:])
    steps = analysis.summary()["num_steps"]
    axes[0].set_title(
        f"{name}: {steps:,} steps logged, {len(events)} events, {alarms} alarms",
        fontsize=10,
        loc="left",
    )
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axis in axes:
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)


def _scale(axis: Axes, values: Sequence[float]) -> None:
    """Limits around ``values``, and a logarithmic axis where they are above zero and span much."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not values:
        return
    low, high = min(values), max(values)
    if low > 0 and high > 1.5 * low:
        axis.set_yscale("log")
        margin = (high / low) ** 0.06
        axis.set_ylim(low / margin, high * margin)
        subs = [1.0, 3.0] if high < 300 * low else [1.0]
        if high < 20 * low:
            subs = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif high > low:
        axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _marker(points: Sequence[object]) -> str | None:
    """Few points are seen one by one."""
    return "o" if len(points) < 40 else None


def _xy(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
