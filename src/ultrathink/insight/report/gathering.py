"""All that the page says, as plain data, read from a run's folder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultrathink.checkpoint.format import read_state
from ultrathink.config.loading import CONFIG_FILE, ORIGINS_FILE
from ultrathink.config.overrides import flatten
from ultrathink.config.yaml_format import parse_yaml
from ultrathink.core.errors import CheckpointError
from ultrathink.insight.logs.run_folder import RunLog
from ultrathink.insight.report.curves import Curve
from ultrathink.insight.report.decisions import (
    Decision,
    json_rows,
    number_of,
    read_decisions,
    read_events,
)
from ultrathink.insight.report.forecasts import Replay, replay
from ultrathink.insight.report.loads import GroupCourse, read_loads
from ultrathink.insight.report.settings import Setting, changed_settings
from ultrathink.monitoring.jsonl import EXPERTS_FILE, SAMPLES_FILE
from ultrathink.monitoring.records import MetricRecord
from ultrathink.orchestrator.events import Event
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.listing import RunSummary, summarize
from ultrathink.runs.reading import config_tree, history, json_object
from ultrathink.runs.segments import Segment, read_segments
from ultrathink.training.budget import is_over

CURVES = ("loss", "lr", "grad_norm", "tokens_per_sec")


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote after ``prompt``."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Story:
    """A run as the page tells it. ``notes`` are what could not be read, in sentences."""

    name: str
    path: Path
    made: float  # unix seconds
    summary: RunSummary
    train: Sequence[MetricRecord]
    val: Sequence[MetricRecord]
    curves: dict[str, Curve]  # of the training lines, by metric
    val_loss: Curve
    replay: Replay
    events: Sequence[Event]
    saw_every_step: bool  # the events are those told while it trained
    decisions: Sequence[Decision]
    groups: Sequence[GroupCourse]
    samples: Sequence[Sample]
    elapsed_s: float | None
    config: dict[str, Any]
    config_text: str
    changed: Sequence[Setting]
    manifest: dict[str, Any]
    segments: Sequence[Segment]
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last logged step; 0 where there is none."""
        return max((records[-1].step for records in (self.train, self.val) if records), default=0)

    @property
    def is_running(self) -> bool:
        """Whether a process was training it when the page was made."""
        return self.summary.state == "running"


def gather(run: RunFolder) -> Story:
    """Read a run; what is missing is left out, and what is damaged is told in ``notes``."""
    notes: list[str] = []
    records = _history(run, notes)
    train = [record for record in records if record.split == "train"]
    val = [record for record in records if record.split == "val"]
    curves = {
        name: Curve.of([(r.step, r.values[name]) for r in train if name in r.values])
        for name in CURVES
    }
    told, saw_every_step = _events(run, notes)
    seen = _replay(run, train, notes)
    decisions, damaged = read_decisions(run.decisions)
    _note_damage(notes, run.decisions, damaged)
    groups, damaged = read_loads(run.path / EXPERTS_FILE)
    _note_damage(notes, run.path / EXPERTS_FILE, damaged)
    config, text = _config(run, notes)
    summary = summarize(run, is_over)
    if summary.problem:
        notes.append(f"{summary.problem}.")
    return Story(
        name=run.name,
        path=run.path,
        made=time.time(),
        summary=summary,
        train=train,
        val=val,
        curves=curves,
        val_loss=Curve.of([(r.step, r.values.get("loss", math.nan)) for r in val]),
        replay=seen,
        events=told if saw_every_step else seen.events,
        saw_every_step=saw_every_step,
        decisions=decisions,
        groups=groups,
        samples=_samples(run, notes),
        elapsed_s=_elapsed(run, records),
        config=config,
        config_text=text,
        changed=changed_settings(config, _origins(run)),
        manifest=_manifest(run, notes),
        segments=_segments(run, notes),
        notes=list(dict.fromkeys(notes)),
    )


def _history(run: RunFolder, notes: list[str]) -> list[MetricRecord]:
    try:
        return history(run.metrics)
    except OSError as error:
        notes.append(f"{run.metrics.name} cannot be read: {error.strerror}.")
        return []


def _replay(run: RunFolder, train: Sequence[MetricRecord], notes: list[str]) -> Replay:
    if not run.metrics.is_file():
        return Replay([], [], [], [], None, [])
    losses = [(float(r.step), r.values.get("loss", math.nan)) for r in train]
    seen = replay(RunLog(run.path), losses=losses)
    notes += [
        f"{run.metrics.name}: {note}" for note in seen.notes if not note.startswith("It saw every")
    ]
    return seen


def _events(run: RunFolder, notes: list[str]) -> tuple[list[Event], bool]:
    """What was told while it trained, and whether somebody watched then."""
    events, damaged = read_events(run.events)
    _note_damage(notes, run.events, damaged)
    if run.events.is_file():
        return events, True
    try:
        mode = config_tree(run.path).get("orchestrator", {}).get("mode", "off")
    except (CheckpointError, AttributeError):
        mode = "off"
    return [], mode not in ("off", False)


def _samples(run: RunFolder, notes: list[str]) -> list[Sample]:
    path = run.path / SAMPLES_FILE
    found, damaged = [], 0
    for row in json_rows(path):
        step = number_of(row.get("step")) if row is not None else None
        if row is None or step is None:
            damaged += 1
            continue
        found.append(Sample(int(step), str(row.get("prompt") or ""), str(row.get("text") or "")))
    _note_damage(notes, path, damaged)
    return found


def _note_damage(notes: list[str], path: Path, count: int) -> None:
    if count:
        lines = "line is" if count == 1 else "lines are"
        notes.append(f"{path.name}: {count:,} {lines} damaged and left out.")


def _elapsed(run: RunFolder, records: Sequence[MetricRecord]) -> float | None:
    """Seconds of training: what the last checkpoint says, and what was logged since."""
    try:
        steps = run.steps()
        progress = read_state(run.step_path(steps[-1]))["progress"] if steps else {}
        saved, elapsed = int(progress["step"]), float(progress["elapsed_s"])
    except (CheckpointError, LookupError, TypeError, ValueError):
        return _logged_time(records)
    later = [record for record in records if record.step >= saved]
    return elapsed + (_logged_time(later) or 0.0)


def _logged_time(records: Sequence[MetricRecord]) -> float | None:
    """The time between records, without the pauses that are far longer than any other."""
    gaps = [max(0.0, b.time - a.time) for a, b in pairwise(records)]
    if not gaps:
        return None
    usual = sorted(gaps)[len(gaps) // 2]
    return sum(gap for gap in gaps if gap <= max(60.0, 20 * usual))


def _config(run: RunFolder, notes: list[str]) -> tuple[dict[str, Any], str]:
    try:
        tree = config_tree(run.path)
        return tree, (run.path / CONFIG_FILE).read_text(encoding="utf-8")
    except CheckpointError as error:
        notes.append(str(error))
    except OSError as error:
        notes.append(f"{CONFIG_FILE} cannot be read: {error.strerror}.")
    return {}, ""


def _origins(run: RunFolder) -> dict[str, str] | None:
    """Where each value came from; None where that is not known."""
    try:
        tree = parse_yaml((run.path / ORIGINS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {str(k): str(v) for k, v in tree.items()} if isinstance(tree, dict) else None


def _manifest(run: RunFolder, notes: list[str]) -> dict[str, Any]:
    try:
        return json_object(run.manifest)
    except CheckpointError as error:
        notes.append(str(error))
        return {}


def _segments(run: RunFolder, notes: list[str]) -> list[Segment]:
    try:
        return read_segments(run.segments)
    except CheckpointError as error:
        notes.append(str(error))
        return []


def flat_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """The facts of a manifest by dotted key."""
    return flatten(manifest) if manifest else {}
