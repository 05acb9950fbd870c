"""The content of a report as plain data, read from a run's folder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultrathink.core.errors import CheckpointError
from ultrathink.insight.events import read_events
from ultrathink.insight.logs.run_folder import RunFolderLog
from ultrathink.insight.report.curves import Series
from ultrathink.insight.report.forecasts import Replay, replay
from ultrathink.insight.report.loads import GroupCourse, read_loads
from ultrathink.insight.report.settings import Setting, changed_settings
from ultrathink.monitoring.records import MetricRecord
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.phases import INITIALIZATION
from ultrathink.runs.decisions import DecisionRecord
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.listing import RunSummary, summarize
from ultrathink.runs.reading import RunReader, Sample
from ultrathink.runs.segments import Segment
from ultrathink.training.budget import is_over

CURVES = ("loss", "lr", "grad_norm", "tokens_per_sec")


@dataclass(frozen=True)
class Story:
    """The content of a report; ``notes`` say what could not be read, in sentences."""

    name: str
    path: Path
    made: float  # unix seconds
    summary: RunSummary
    train: Sequence[MetricRecord]
    val: Sequence[MetricRecord]
    curves: dict[str, Series]  # of the training lines, by metric
    val_loss: Series
    evaluated: dict[str, list[tuple[int, float]]]  # step and value, by evaluator and figure
    replay: Replay
    events: Sequence[Event]
    mode: str | None  # orchestrator.mode; None where the configuration cannot be read
    saw_every_step: bool  # the events are those that detectors reported during training
    decisions: Sequence[DecisionRecord]
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
    def is_short(self) -> bool:
        """Whether too few steps were logged to judge how the loss develops."""
        return all(phase.phase == INITIALIZATION for phase in self.replay.phases)


def gather(run: RunFolder) -> Story:
    """Read a run; what is missing is left out, and ``notes`` name what is damaged."""
    reader = RunReader(run)
    summary = summarize(run, is_over)
    records = reader.attempt(reader.history) or []
    train = [record for record in records if record.split == "train"]
    val = [record for record in records if record.split == "val"]
    curves = {
        name: Series.of([(r.step, r.values[name]) for r in train if name in r.values])
        for name in CURVES
    }
    replayed = _replay(run, train)
    config = reader.attempt(reader.config) or {}
    mode = reader.orchestrator_mode() if config else None
    saw_every_step = run.events.is_file() or mode not in ("off", None)
    found = reader.attempt(lambda: read_events(reader)) or []
    story = Story(
        name=run.name,
        path=run.path,
        made=time.time(),
        summary=summary,
        train=train,
        val=val,
        curves=curves,
        val_loss=Series.of([(r.step, r.values.get("loss", math.nan)) for r in val]),
        evaluated=_evaluated(records),
        replay=replayed,
        events=found if saw_every_step else replayed.events,
        mode=mode,
        saw_every_step=saw_every_step,
        decisions=reader.attempt(reader.decisions) or [],
        groups=reader.attempt(lambda: read_loads(reader)) or [],
        samples=reader.attempt(reader.samples) or [],
        elapsed_s=_elapsed(reader, records),
        config=config,
        config_text=reader.attempt(reader.config_text) or "" if config else "",
        changed=changed_settings(config, reader.origins()),
        manifest=reader.attempt(reader.manifest) or {},
        segments=reader.attempt(reader.segments) or [],
    )
    problems = [f"{summary.problem}."] if summary.problem else []
    return replace(story, notes=list(dict.fromkeys([*problems, *reader.notes])))


def _evaluated(records: Sequence[MetricRecord]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.values.items():
            if record.split == "eval" and name != "tokens":
                found.setdefault(name, []).append((record.step, value))
    return found


def _replay(run: RunFolder, train: Sequence[MetricRecord]) -> Replay:
    if not run.metrics.is_file():
        return Replay([], [], [], [], None)
    losses = [(float(r.step), r.values.get("loss", math.nan)) for r in train]
    return replay(RunFolderLog(run), losses=losses)


def _elapsed(reader: RunReader, records: Sequence[MetricRecord]) -> float | None:
    """Seconds of training up to the last checkpoint, and those logged since."""
    try:
        progress = reader.last_state()["progress"]
        saved, elapsed = int(progress["step"]), float(progress["elapsed_s"])
    except (CheckpointError, LookupError, TypeError, ValueError):
        return _logged_time(records)
    later = [record for record in records if record.step >= saved]
    return elapsed + (_logged_time(later) or 0.0)


def _logged_time(records: Sequence[MetricRecord]) -> float | None:
    """The time between records, without pauses far longer than the others."""
    gaps = [max(0.0, b.time - a.time) for a, b in pairwise(records)]
    if not gaps:
        return None
    usual = sorted(gaps)[len(gaps) // 2]
    return sum(gap for gap in gaps if gap <= max(60.0, 20 * usual))
