"""The analysis of a whole log: its runs, their curves and events, and one report of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrathink.insight.logs.log import Log, LogSignals
from ultrathink.insight.logs.names import ALIASES
from ultrathink.insight.plain import without_nan
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.forecast import Forecast
from ultrathink.orchestrator.phases import Phase
from ultrathink.orchestrator.watcher import Watcher

Point = tuple[float, float]
CURVES = ("loss", "val_loss", "grad_norm")


@dataclass
class Course:
    """One run of a log: its watcher, its curves by signal, and the losses that were undone."""

    name: str
    watcher: Watcher
    curves: dict[str, list[Point]] = field(default_factory=dict)
    undone: list[list[Point]] = field(default_factory=list)  # training losses that a resume cut
    steps: set[int] = field(default_factory=set)

    @property
    def losses(self) -> list[Point]:
        """Training losses by step; validation losses where the log has no other."""
        return self.curves.get("loss") or self.curves.get("val_loss", [])

    def observe(self, signals: LogSignals) -> list[Event]:
        """Take the next record; the events that are new, or graver than before."""
        events = []
        if signals.undone is not None:
            self._cut(signals.undone)
            events = self.watcher.rewind(signals.undone)
        self.steps.add(signals.step)
        for name in CURVES:
            value = signals.finite(name)
            if value is not None:
                self.curves.setdefault(name, []).append((float(signals.step), value))
        return events + self.watcher.observe(signals)

    def _cut(self, step: int) -> None:
        for name, curve in self.curves.items():
            kept = len(curve)
            while kept and curve[kept - 1][0] > step:
                kept -= 1
            if name == "loss" and kept < len(curve):
                self.undone.append(curve[max(0, kept - 1) :])
            del curve[kept:]


class LogAnalysis:
    """Everything that is found in one log, which may hold several runs."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.signals: dict[str, int] = {}  # how often each was recorded
        self._courses: dict[str, Course] = {}

    @property
    def courses(self) -> list[Course]:
        """The runs of the log, in the order in which they begin."""
        return list(self._courses.values())

    @property
    def has_several(self) -> bool:
        """Whether the log holds more than one run."""
        return len(self._courses) > 1

    def observe(self, signals: LogSignals) -> list[Event]:
        """Take the next record; the events that are new, or graver than before."""
        if signals.run not in self._courses:
            self._courses[signals.run] = Course(signals.run, Watcher())
            if self.has_several and "" in self._courses:  # it was the only one so far
                self._courses[""].name = "run 1"
        course = self._courses[signals.run]
        course.watcher.total_steps = self.log.total_steps
        for name in signals.values:
            self.signals[name] = self.signals.get(name, 0) + 1
        return course.observe(signals)

    def finish(self) -> list[Event]:
        """The log is over: judge what waits for later steps; the events that are new."""
        return [event for course in self.courses for event in course.watcher.finish()]

    def events(self) -> list[tuple[str, Event]]:
        """All events with the names of their runs, in order."""
        return [(course.name, event) for course in self.courses for event in course.watcher.events]

    def phases(self) -> list[tuple[str, Phase]]:
        """All phases with the names of their runs, in order."""
        return [(course.name, phase) for course in self.courses for phase in course.watcher.phases]

    def forecast(self) -> Forecast | None:
        """The predicted loss of the last run."""
        return self.courses[-1].watcher.forecast() if self.courses else None

    def report(self) -> dict[str, Any]:
        """What was read and what was found, as one JSON object without NaN."""
        ahead = self.forecast()
        found: dict[str, Any] = {
            "log": self.summary(),
            "events": [self._named(run, event.to_json()) for run, event in self.events()],
            "phases": [self._named(run, phase.to_json()) for run, phase in self.phases()],
            "forecast": ahead.to_json() if ahead is not None else None,
        }
        cleaned: dict[str, Any] = without_nan(found)
        return cleaned

    def summary(self) -> dict[str, Any]:
        """What was read: the format, steps and signals."""
        steps = [step for course in self.courses for step in course.steps]
        summary: dict[str, Any] = {
            "path": str(self.log.path),
            "format": self.log.format,
            "num_steps": sum(len(course.steps) for course in self.courses),
            "first_step": min(steps, default=None),
            "last_step": max(steps, default=None),
            "total_steps": self.log.total_steps,
            "signals": sorted(self.signals, key=_rank),
            "notes": list(self.log.notes),
        }
        if self.has_several:
            summary["runs"] = [course.name for course in self.courses]
        return summary

    def _named(self, run: str, found: dict[str, Any]) -> dict[str, Any]:
        return {"run": run, **found} if self.has_several else found


def _rank(signal: str) -> tuple[int, str]:
    """Standard names first, in their order."""
    names = list(ALIASES)
    return (names.index(signal) if signal in names else len(names), signal)


def without_start(curve: Sequence[Point]) -> Sequence[Point]:
    """A curve without its first fall, which would take most of a plot's height."""
    return curve[len(curve) // 40 :]
