"""The findings of a log, for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from pydantic_core import to_jsonable_python

from ultrathink.insight.events import most_severe
from ultrathink.insight.log_analysis import Course, LogAnalysis, without_start
from ultrathink.insight.logs.log import Log
from ultrathink.monitoring.plot import Scale
from ultrathink.monitoring.plot_view import PlotView
from ultrathink.monitoring.report import Cell, Column, Report
from ultrathink.orchestrator.events import SEVERITIES, Event
from ultrathink.orchestrator.phases import (
    CONVERGING,
    DIVERGING,
    INITIALIZATION,
    PLATEAU,
    VOLATILE,
    Phase,
)

SEVERITY_STYLES = {
    "info": "dim",
    "low": "cyan",
    "medium": "yellow",
    "high": "red",
    "critical": "bold white on red",
}
PHASE_STYLES = {
    INITIALIZATION: "dim",
    VOLATILE: "yellow",
    CONVERGING: "green",
    PLATEAU: "blue",
    DIVERGING: "red",
}
_MAX_WIDTH = 90
_MAX_EVENTS = 40
_MAX_PHASES = 8
_MAX_SIGNALS = 10
_FAMILIES = ("experts/", "grad_norm/")


def print_analysis(analysis: LogAnalysis) -> None:
    """Print all findings on standard output, for people."""
    report = Report()
    _print_log(report, analysis)
    for course in analysis.courses:
        report.line()
        if analysis.has_several:
            report.line(Cell(course.name, "bold"))
        _print_curve(report, course)
        _print_events(report, course.watcher.events)
        _print_phases(report, course.watcher.phases)
    _print_forecast(report, analysis)


class FollowView:
    """Prints events as they come: a line each, or a JSON object each."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._report = Report()
        self._shown: set[tuple[str, int, str, str, str]] = set()
        self._phases: dict[str, str | None] = {}  # the last one, by run

    def begin(self, log: Log) -> None:
        """Print the name and format of a log."""
        if not self._as_json:
            self._line(Cell(str(log.path), "bold"), f"  {log.format}")

    def show(self, course: Course, events: Sequence[Event], *, is_named: bool) -> None:
        """Print the new events of a run; those shown before a restart are not repeated."""
        name = course.name if is_named else ""
        for event in events:
            key = (course.name, event.step, event.kind, event.subject, event.severity)
            if key not in self._shown:
                self._shown.add(key)
                self._show_event(name, event)
        phase = course.watcher.phase
        if phase != self._phases.get(course.name) and phase is not None and not self._as_json:
            last = course.watcher.phases[-1]
            text = Cell(f"phase {phase}", PHASE_STYLES[phase])
            self._line(f"{last.to_step:>10,}  ", *_named(name), text)
        self._phases[course.name] = phase

    def _show_event(self, name: str, event: Event) -> None:
        if self._as_json:
            found = {**({"run": name} if name else {}), **event.to_json()}
            plain = to_jsonable_python(found, inf_nan_mode="null")
            print(json.dumps(plain, ensure_ascii=False), flush=True)
            return
        self._line(
            f"{event.step:>10,}  ",
            *_named(name),
            Cell(f"{event.severity:<8}", SEVERITY_STYLES[event.severity]),
            f"  {event.kind}: {event.message}",
        )

    def _line(self, *parts: str | Cell) -> None:
        self._report.line(*parts)
        print(end="", flush=True)


def _named(run: str) -> list[Cell]:
    return [Cell(f"{run}  ", "bold")] if run else []


def _print_log(report: Report, analysis: LogAnalysis) -> None:
    summary = analysis.summary()
    report.line(Cell(summary["path"], "bold"), f"  {summary['format']}")
    first, last, total = (summary[name] for name in ("first_step", "last_step", "total_steps"))
    if first is None:
        report.line("  nothing was recorded")
        return
    of = f" of {total:,}" if total and total > last else ""
    runs = f" in {len(analysis.courses)} runs" if analysis.has_several else ""
    report.line(f"  {summary['num_steps']:,} steps logged, {first:,} to {last:,}{of}{runs}")
    # Of a family, as experts/skill/gini, one name.
    names = list(
        dict.fromkeys(
            f"{name.partition('/')[0]}/*" if name.startswith(_FAMILIES) else name
            for name in summary["signals"]
        )
    )
    more = f" and {len(names) - _MAX_SIGNALS} more" if len(names) > _MAX_SIGNALS else ""
    report.line(f"  signals: {', '.join(names[:_MAX_SIGNALS])}{more}")
    for note in summary["notes"]:
        report.line(Cell(f"  {note}", "yellow"))


def _print_curve(report: Report, course: Course) -> None:
    """The loss over steps with a mark below for every alarm."""
    curve = course.losses
    scale = Scale.of([without_start(curve)])
    if scale is None or len(curve) < 2 or not report.can_draw:
        return
    begin, end = curve[0][0], curve[-1][0]
    span = max(1.0, end - begin)
    shifted = [(step - begin, min(max(loss, scale.low), scale.high)) for step, loss in curve]
    view = PlotView(report, scale, end=span, max_width=_MAX_WIDTH)
    marks = _marks(course.watcher.events, begin, span, view.width)
    view.print_dots([shifted], ["cyan"])
    view.print_foot(
        [
            Cell("▲", SEVERITY_STYLES[severity]) if severity else Cell("─", "dim")
            for severity in marks
        ]
    )
    left, right = f"{begin:,.0f}", f"step {end:,.0f}"
    space = max(0, view.width - len(left))
    report.line(Cell(f"{'':>{view.margin + 2}}{left}{right:>{space}}", "dim"))


def _marks(events: Sequence[Event], begin: float, span: float, width: int) -> list[str]:
    """For each column the highest severity of an alarm that began there; else an empty text."""
    marks = [""] * width
    for event in events:
        if event.is_alarm and begin <= event.step <= begin + span:
            column = min(width - 1, int((event.step - begin) / span * width))
            marks[column] = max(marks[column], event.severity, key=_gravity)
    return marks


def _gravity(severity: str) -> int:
    return SEVERITIES.index(severity) if severity else -1


def _print_events(report: Report, events: Sequence[Event]) -> None:
    alarms = sum(event.is_alarm for event in events)
    report.line()
    if not events:
        report.line(Cell("No events in the logged steps.", "green"))
        return
    counted = f"{alarms} alarm{'' if alarms == 1 else 's'}" if alarms else "no alarm"
    title = f"{len(events)} event{'' if len(events) == 1 else 's'}, {counted}"
    report.line(Cell(title, "bold" if alarms else "green"))
    shown = most_severe(events, _MAX_EVENTS)
    rows: list[list[str | Cell]] = [
        [
            _steps(event),
            Cell(event.severity, SEVERITY_STYLES[event.severity]),
            event.kind,
            event.message,
        ]
        for event in shown
    ]
    columns = [Column("step", right=True), Column(""), Column(""), Column("", folds=True)]
    report.table(columns, rows, indent=2, heading=False)
    if len(events) > len(shown):
        hidden = len(events) - len(shown)
        report.line(Cell(f"  and {hidden} more, none more severe; --json has all", "dim"))


def _steps(event: Event) -> str:
    if event.to_step == event.step:
        return f"{event.step:,}"
    return f"{event.step:,} to {event.to_step:,}"


def _print_phases(report: Report, phases: Sequence[Phase]) -> None:
    if not phases:
        return
    parts: list[str | Cell] = ["phases: "]
    if len(phases) > _MAX_PHASES:
        parts.append(Cell(f"({len(phases) - _MAX_PHASES} earlier) ", "dim"))
    for number, phase in enumerate(phases[-_MAX_PHASES:]):
        parts.append(" → " if number else "")
        parts.append(Cell(phase.phase, PHASE_STYLES[phase.phase]))
        parts.append(Cell(f" {phase.from_step:,} to {phase.to_step:,}", "dim"))
    report.line()
    report.line(*parts)


def _print_forecast(report: Report, analysis: LogAnalysis) -> None:
    ahead = analysis.forecast()
    if ahead is None or ahead.step <= ahead.at_step or not math.isfinite(ahead.loss):
        return
    report.line(
        f"forecast: loss {ahead.loss:.4g} at step {ahead.step:,}, with {ahead.level:.0%} between "
        f"{ahead.low:.4g} and {ahead.high:.4g}"
    )
