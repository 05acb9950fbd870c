"""A plot of a log by matplotlib: the loss with events and phases, and the gradient norm below it.

matplotlib is in the extra ``plot``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ultrathink.core.errors import MissingDependencyError
from ultrathink.insight.log_analysis import LogAnalysis, without_start
from ultrathink.insight.report.curves import Series, smoothed
from ultrathink.monitoring.plot import Point
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
_MANY = 256  # points above which a smoothed line is drawn over the raw one
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
    """Write the plot of a log to ``path``; the suffix decides the format."""
    require_matplotlib()
    from matplotlib.figure import Figure

    has_norm = any("grad_norm" in course.curves for course in analysis.courses)
    # A Figure without pyplot needs no display.
    figure = Figure(figsize=(12, 6.8 if has_norm else 5.2), dpi=130, layout="constrained")
    heights = [3.2, 1] if has_norm else [1]
    grid = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    axes: list[Axes] = list(grid[:, 0])
    events = [event for _, event in analysis.events()]
    _draw_losses(axes[0], analysis)
    _draw_events(axes[0], events)
    if has_norm:
        _draw_norms(axes[1], analysis)
    for axis in axes:
        if not analysis.has_several:  # bands of several runs would overlap
            _draw_phases(axis, [phase for _, phase in analysis.phases()])
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    alarms = sum(event.is_alarm for event in events)
    name, steps = "/".join(analysis.log.path.parts[-2:]), analysis.summary()["num_steps"]
    title = f"{name}: {steps:,} steps logged, {len(events)} events, {alarms} alarms"
    axes[0].set_title(title, fontsize=10, loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))  # one entry for each label
    figure.legend(
        list(legend.values()), list(legend), loc="outside lower center", fontsize=8, frameon=False,
        ncols=3 if analysis.has_several else 6,
    )  # fmt: skip
    figure.savefig(path)


def _draw_losses(axis: Axes, analysis: LogAnalysis) -> None:
    shown = _draw_forecast(axis, analysis)
    for number, course in enumerate(analysis.courses):
        color = _LINE_COLORS[number % len(_LINE_COLORS)]
        name = f"{course.name}: " if analysis.has_several else ""
        for undone in course.undone:
            axis.plot(*_xy(undone), color="#999999", lw=0.8, ls=":", label="undone by a resume")
        losses = course.curves.get("loss", [])
        if len(losses) > _MANY:
            axis.plot(*_xy(losses), color=color, lw=0.6, alpha=0.45)
            smooth = smoothed(Series.of(losses))
            points = list(zip(smooth.steps, smooth.values, strict=True))
            _line(axis, points, color=color, lw=1.6, label=f"{name}training loss")
        else:
            _line(axis, losses, color=color, lw=1.3, label=f"{name}training loss")
        val = course.curves.get("val_loss", [])
        _line(axis, val, color="#c0392b", lw=1.2, label=f"{name}validation loss")
        shown += [loss for curve in (losses, val) for _, loss in without_start(curve)]
    _scale(axis, shown)
    axis.set_ylabel("loss (nats)")


def _draw_forecast(axis: Axes, analysis: LogAnalysis) -> list[float]:
    """Draw the forecast, at the right edge where its step is far away; its interval."""
    ahead = analysis.forecast()
    if ahead is None or ahead.step <= ahead.at_step:
        return []
    first, last = min(analysis.courses[-1].steps), max(analysis.courses[-1].steps)
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
        points = course.curves.get("grad_norm", [])
        _line(axis, points, color=_LINE_COLORS[number % len(_LINE_COLORS)], lw=0.7)
        norms += [norm for _, norm in points]
    _scale(axis, norms)
    axis.set_ylabel("gradient norm")


def _draw_phases(axis: Axes, phases: Sequence[Phase]) -> None:
    starts = [phase.from_step for phase in phases]
    for number, phase in enumerate(phases):
        end = max([phase.to_step, *starts[number + 1 : number + 2]])  # bands touch
        axis.axvspan(
            phase.from_step, end, color=PHASE_COLORS[phase.phase], lw=0, alpha=0.75, zorder=0,
            label=phase.phase,
        )  # fmt: skip


def _draw_events(axis: Axes, events: Sequence[Event]) -> None:
    """Alarms as lines, the most severe with their kinds; other events as marks at the foot."""
    most_severe = sorted(events, key=lambda event: -SEVERITIES.index(event.severity))[:_MAX_MARKS]
    for event in reversed(most_severe):
        color = SEVERITY_COLORS[event.severity]
        top = 1.0 if event.is_alarm else 0.03
        axis.axvline(event.step, ymax=top, color=color, lw=0.9, zorder=2, label=event.severity)
        if event.is_alarm and event.to_step > event.step:
            axis.axvspan(event.step, event.to_step, color=color, alpha=0.12, lw=0, zorder=1)
    labelled = [event for event in most_severe if event.is_alarm][:_MAX_LABELS]
    for number, event in enumerate(sorted(labelled, key=lambda event: event.step)):
        axis.annotate(
            f"{event.kind.replace('_', ' ')}\nstep {event.step:,}",
            (event.step, 0.97 - 0.09 * number), xycoords=("data", "axes fraction"),
            xytext=(5, 0), textcoords="offset points", va="top", fontsize=8, zorder=6,
            color=SEVERITY_COLORS[event.severity],
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def _scale(axis: Axes, values: Sequence[float]) -> None:
    """Limits around ``values``, and a logarithmic axis where they are above zero and span much."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(values, default=0.0), max(values, default=0.0)
    if low > 0 and high > 1.5 * low:
        axis.set_yscale("log")
        ratio = high / low
        axis.set_ylim(low / ratio**0.06, high * ratio**0.06)
        # Labels by which a reader finds values, also within one decade.
        subs = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 20 else (1, 3) if ratio < 300 else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif high > low:
        axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axis.yaxis.set_major_formatter("{x:g}")


def _line(axis: Axes, points: Sequence[Point], *, color: str, lw: float, label: str = "") -> None:
    if not points:  # it would stand in the legend
        return
    marker = "o" if len(points) < 40 else None
    axis.plot(*_xy(points), color=color, lw=lw, marker=marker, ms=3, label=label)


def _xy(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
