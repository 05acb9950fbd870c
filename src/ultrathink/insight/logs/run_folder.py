"""A run of our own: ``metrics.jsonl``, with what ``experts.jsonl`` knows of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ultrathink.insight.events import read_events
from ultrathink.insight.logs.files import Tail, our_log
from ultrathink.insight.logs.log import Log, LogSignals, News
from ultrathink.monitoring.expert_figures import figures_of
from ultrathink.monitoring.jsonl import parse_object
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.reading import RunReader


class RunFolderLog(Log):
    """The log of a run folder. A resume cuts its files, which counts as a step back."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run.path, "run folder")
        self._reader = RunReader(run)
        self.total_steps = self._reader.planned_steps()
        self._metrics = our_log(run.metrics)
        self._experts = Tail(run.experts)
        self._waiting: dict[int, dict[str, float]] = {}  # figures of experts, by step
        self._last_step = 0

    def signals(self) -> Iterator[LogSignals]:
        """All signals from the beginning, those of experts beside the losses of their step."""
        experts = _figures_by_step(self._reader.rows(self._reader.run.experts))
        for signals in self._metrics.signals():
            yield _joined(signals, experts)
        self.notes = list(self._metrics.notes)
        if count := sum(event.is_alarm for event in read_events(self._reader)):
            alarms = f"{count:,} alarm{'' if count == 1 else 's'}"
            name = self._reader.run.events.name
            self.notes.append(
                f"During training, the run checked every step and raised {alarms}; see {name}."
            )

    def poll(self) -> News:
        """What was appended to either file; figures of experts that come late come alone."""
        new = self._metrics.poll()
        with suppress(FileNotFoundError):
            lines, _ = self._experts.read()
            self._waiting |= _figures_by_step(map(parse_object, lines))
        if new.is_replaced:
            self._last_step = 0
        signals = [_joined(found, self._waiting) for found in new.signals]
        if signals:
            self._last_step = max(found.step for found in signals)
        late = sorted(step for step in self._waiting if step <= self._last_step)
        return News(
            [*signals, *(LogSignals(step, self._waiting.pop(step)) for step in late)],
            new.is_replaced,
        )


def _figures_by_step(rows: Iterable[dict[str, Any] | None]) -> dict[int, dict[str, float]]:
    return {
        row["step"]: figures_of(row)
        for row in rows
        if row is not None and isinstance(row.get("step"), int)
    }


def _joined(signals: LogSignals, experts: dict[int, dict[str, float]]) -> LogSignals:
    """Signals of a training line with the figures of its experts, which are taken out."""
    if "loss" not in signals.values or signals.step not in experts:
        return signals
    return replace(signals, values={**signals.values, **experts.pop(signals.step)})
