"""A run of our own: ``metrics.jsonl``, with what ``experts.jsonl`` knows of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ultrathink.core.errors import CheckpointError
from ultrathink.insight.logs.json_lines import JsonReader, our_rows, parse_object
from ultrathink.insight.logs.line_log import LineLog
from ultrathink.insight.logs.log import Log, LogSignals, News
from ultrathink.insight.logs.tail import Tail, all_lines
from ultrathink.monitoring.expert_figures import figures_of
from ultrathink.orchestrator.events import ALARM, SEVERITIES
from ultrathink.runs.reading import config_tree

METRICS_FILE, EXPERTS_FILE, EVENTS_FILE = "metrics.jsonl", "experts.jsonl", "events.jsonl"


class RunLog(Log):
    """The log of a run folder. A resume cuts its files, which counts as a step back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "run folder")
        self.total_steps = planned_steps(folder)
        self._metrics = LineLog(folder / METRICS_FILE, "", lambda: JsonReader(our_rows()))
        self._experts = Tail(folder / EXPERTS_FILE)
        self._waiting: dict[int, dict[str, float]] = {}  # figures of experts, by step
        self._last_step = 0

    def signals(self) -> Iterator[LogSignals]:
        """All signals from the beginning, those of experts beside the losses of their step."""
        experts: dict[int, dict[str, float]] = {}
        with suppress(FileNotFoundError):
            lines = (line for line, _ in all_lines(self.path / EXPERTS_FILE))
            experts = _figures_by_step(lines)
        for signals in self._metrics.signals():
            yield _joined(signals, experts)
        self.notes = [*self._metrics.notes, *_told_while_training(self.path)]

    def poll(self) -> News:
        """What was appended to either file; figures of experts that come late come alone."""
        new = self._metrics.poll()
        with suppress(FileNotFoundError):
            self._waiting |= _figures_by_step(self._experts.read().lines)
        if new.is_anew:
            self._last_step = 0
        signals = [_joined(found, self._waiting) for found in new.signals]
        if signals:
            self._last_step = max(found.step for found in signals)
        late = sorted(step for step in self._waiting if step <= self._last_step)
        return News(
            [*signals, *(LogSignals(step, self._waiting.pop(step)) for step in late)], new.is_anew
        )


def planned_steps(folder: Path) -> int | None:
    """How many steps a run is to take, as its configuration has it."""
    try:
        training = config_tree(folder).get("training")
    except CheckpointError:
        return None
    if not isinstance(training, dict):
        return None
    total = training.get("max_steps") or training.get("step_budget")
    return total if isinstance(total, int) else None


def _told_while_training(folder: Path) -> list[str]:
    """How many alarms the run itself raised: it saw the steps between the logged ones too."""
    told = set()
    with suppress(FileNotFoundError):
        for line, _ in all_lines(folder / EVENTS_FILE):
            event = parse_object(line) or {}
            if event.get("severity") in SEVERITIES[ALARM:]:
                told.add((event.get("kind"), event.get("subject"), event.get("began")))
    alarms = f"{len(told):,} alarm{'' if len(told) == 1 else 's'}"
    return [f"It saw every step as it trained, and raised {alarms}: {EVENTS_FILE}"] if told else []


def _figures_by_step(lines: Iterable[str]) -> dict[int, dict[str, float]]:
    found = {}
    for line in lines:
        record = parse_object(line)
        if record is not None and isinstance(record.get("step"), int):
            found[record["step"]] = figures_of(record)
    return found


def _joined(signals: LogSignals, experts: dict[int, dict[str, float]]) -> LogSignals:
    """Signals of a training line with the figures of its experts, which are taken out."""
    if "loss" not in signals.values or signals.step not in experts:
        return signals
    return LogSignals(signals.step, {**signals.values, **experts.pop(signals.step)})
