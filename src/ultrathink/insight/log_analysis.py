"""The analysis of a whole log: its runs, their curves and events, and one report of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python

from ultrathink.insight.logs.log import Log, LogSignals
from ultrathink.insight.logs.names import ALIASES
from ultrathink.monitoring.plot import Point
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.forecast import Forecast
from ultrathink.orchestrator.phases import Phase
from ultrathink.orchestrator.watcher import Watcher

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
        self.signals = Counter[str]()  # how often each was recorded
        self.runs: dict[str, Course] = {}  # by ``LogSignals.run``, in the order of their starts

    @property
    def courses(self) -> list[Course]:
        """The runs of the log."""
        return list(self.runs.values())

    @property
    def has_several(self) -> bool:
        """Whether the log holds more than one run."""
        return len(self.runs) > 1

    def observe(self, signals: LogSignals) -> list[Event]:
        """Take the next record; the events that are new, or graver than before."""
        if signals.run not in self.runs:
            self.runs[signals.run] = Course(signals.run, Watcher())
            if self.has_several and "" in self.runs:  # it was the only one so far
                self.runs[""].name = "run 1"
        course = self.runs[signals.run]
        course.watcher.total_steps = self.log.total_steps
        self.signals.update(signals.values.keys())
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
        found = {
            "log": self.summary(),
            "events": [self._named(run, event.to_json()) for run, event in self.events()],
            "phases": [self._named(run, phase.to_json()) for run, phase in self.phases()],
            "forecast": ahead.to_json() if ahead is not None else None,
        }
        plain: dict[str, Any] = to_jsonable_python(found, inf_nan_mode="null")
        return plain

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
            "signals": [name for name in ALIASES if name in self.signals]
            + sorted(self.signals.keys() - ALIASES.keys()),
            "notes": list(self.log.notes),
        }
        if self.has_several:
            summary["runs"] = [course.name for course in self.courses]
        return summary

    def _named(self, run: str, found: dict[str, Any]) -> dict[str, Any]:
        return {"run": run, **found} if self.has_several else found


def without_start(curve: Sequence[Point]) -> Sequence[Point]:
    """A curve without its first fall, which would take most of a plot's height."""
    return curve[len(curve) // 40 :]
