"""When detectors alone would have called somebody: the recorded signals, watched step by step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fault_runs import SIGNALS
from fault_scoring import Alarms
from fault_setting import Job

from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.watcher import Watcher


def watch_run(job: Job, out: Path) -> Alarms:
    """The alarms in a run, its snapshot's steps included; those of the snapshot count once a seed.

    They count with the clean run, whose healthy steps are those from the beginning.
    """
    lines = read_signals(out / job.folder / SIGNALS)
    first = int(lines[0]["step"]) if lines else 1
    before = []
    if job.kind != "healthy":
        snapshot = Job("snapshot", job.model, job.seed, job.num_steps)
        before = read_signals(out / snapshot.folder / SIGNALS)
    found = alarms_in([*before, *lines], total_steps=job.num_steps)
    if job.kind == "fault":  # what is found before it is the clean twin's to tell
        found = [(step, kind) for step, kind in found if step >= first]
    return Alarms(tuple(found), len(before) + len(lines))


def alarms_in(lines: Sequence[dict[str, Any]], *, total_steps: int) -> list[tuple[int, str]]:
    """The step at which each event first was an alarm, and its kind."""
    watcher = Watcher(total_steps=total_steps)
    first: dict[tuple[str, str, int], int] = {}

    def take(events: Iterable[Event], step: int) -> None:
        for event in events:
            if event.is_alarm:
                first.setdefault((event.kind, event.subject, event.step), step)

    step = 0
    for line in lines:
        values = {name: float(value) for name, value in line.items() if name != "step"}
        step = int(line["step"])
        take(watcher.observe(Signals(step, values)), step)
    take(watcher.finish(), step)
    return sorted((step, kind) for (kind, _, _), step in first.items())


def read_signals(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of signals; none where a run died before its first step."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
