"""A run of our own: ``metrics.jsonl``, with what ``experts.jsonl`` knows of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultrathink.core.errors import CheckpointError
from ultrathink.orchestrator.events import ALARM, SEVERITIES
from ultrathink.orchestrator.logs.json_lines import JsonReader, our_rows, parse_object
from ultrathink.orchestrator.logs.line_log import LineLog
from ultrathink.orchestrator.logs.log import Log, LogSignals, News
from ultrathink.orchestrator.logs.tail import Tail, all_lines
from ultrathink.runs.reading import config_tree

METRICS_FILE, EXPERTS_FILE, EVENTS_FILE = "metrics.jsonl", "experts.jsonl", "events.jsonl"
_Summary = Callable[[Iterable[float]], float]


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given)


# How the layers of a group become one figure: the worst of them, and sums of counts.
_OVER_LAYERS: dict[str, _Summary] = {
    "entropy": min,
    "entropy_normalized": min,
    "utilization": min,
    "balance_score": min,
    "capacity_utilization": max,
    "experts_per_token": min,
    "confidence": _mean,
    "gini": max,
    "gini_of_noise": max,
    "k_max": max,
    "k_rel": max,
    "s_rel": max,
    "load_variance": max,
    "max_exp_multi": max,
    "max_min": max,
    "dead": sum,
    "dropped": sum,
}


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


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of ``experts.jsonl`` as ``experts/<group>/<figure>``, the worst over its layers.

    ``dropped_share`` is the share of a group's choices that were dropped; ``num_experts`` counts
    the experts of all layers; ``even_load`` is what each would get if all got equally many.
    """
    figures: dict[str, float] = {}
    for group, lists in record.get("groups", {}).items():
        for name, over_layers in _OVER_LAYERS.items():
            values = [float(value) for value in lists.get(name, ()) if value is not None]
            if values:
                figures[f"experts/{group}/{name}"] = float(over_layers(values))
        loads = [load for row in lists.get("load", ()) for load in row if load is not None]
        figures[f"experts/{group}/num_experts"] = float(len(loads))
        dropped = figures.get(f"experts/{group}/dropped", 0.0)
        figures[f"experts/{group}/dropped_share"] = dropped / max(1.0, float(sum(loads)))
        figures[f"experts/{group}/even_load"] = float(sum(loads)) / max(1, len(loads))
    return figures


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
