"""Checks that a run's ``metrics.jsonl`` has every expected line, once and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from ultrathink.config.schema import Config
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.reading import RunReader, is_undone
from ultrathink.runs.segments import Segment

Status = Literal["ok", "note", "damaged"]


def check_metrics(
    run: RunFolder, config: Config | None, saved_step: int
) -> list[tuple[Status, str]]:
    """The findings on the metrics of a run whose newest checkpoint is of ``saved_step``.

    A last line torn by a crash is no damage, since a resume drops it; nor are decreasing steps
    where ``decisions.jsonl`` has a rollback.
    """
    if config is not None and "jsonl" not in config.monitoring.sinks:
        return []
    if not run.metrics.exists():
        status: Status = "damaged" if saved_step else "note"
        return [(status, "is missing" if saved_step else "there is none yet")]
    reader = RunReader(run)
    try:
        lines = _read(reader)
    except OSError as error:
        return [("damaged", f"cannot be read ({error.strerror})")]
    found: list[tuple[Status, str]] = []
    if lines.torn:
        found.append(("damaged", f"{_lines(lines.torn)} cannot be read"))
    if lines.misplaced:
        number, step, before = lines.misplaced[0]
        more = f", and {len(lines.misplaced) - 1} more like it" if len(lines.misplaced) > 1 else ""
        found.append(("damaged", f"line {number} (step {step}) follows step {before}{more}"))
    if config is not None:
        found += _gaps(lines.train_steps, saved_step, reader, config)
    if lines.tail_is_torn:
        found.append(("note", "its last line is torn, as by a crash; a resume drops it"))
    return found or [("ok", f"{lines.count:,} lines, up to step {lines.last_step:,}")]


@dataclass
class _Lines:
    """The lines of a metrics file."""

    count: int = 0
    last_step: int = 0
    torn: list[int] = field(default_factory=list)  # numbers of lines
    tail_is_torn: bool = False
    misplaced: list[tuple[int, int, int]] = field(default_factory=list)  # line, step, step before
    train_steps: set[int] = field(default_factory=set)


def _read(reader: RunReader) -> _Lines:
    rollbacks = [one.rollback for one in reader.decisions() if one.rollback is not None]
    found = _Lines()
    previous = None
    for number, (line, record) in enumerate(reader.metric_lines(), start=1):
        found.count = number
        if record is None:
            if line.endswith(b"\n"):
                found.torn.append(number)
            else:
                found.tail_is_torn = True
            continue
        if (
            previous is not None
            and is_undone(previous, record)
            and not _is_rolled_back(previous.step, record.step, rollbacks)
        ):
            found.misplaced.append((number, record.step, previous.step))
        if record.split == "train":
            found.train_steps.add(record.step)
        found.last_step = record.step
        previous = record
    return found


def _is_rolled_back(before: int, step: int, rollbacks: Sequence[tuple[int, int]]) -> bool:
    return any(source >= before and target < step for source, target in rollbacks)


def _gaps(
    logged: set[int], saved_step: int, reader: RunReader, config: Config
) -> list[tuple[Status, str]]:
    """The steps that should have been logged but were not."""
    segments = reader.attempt(reader.segments) or []  # their damage is reported elsewhere
    end = max(logged | {saved_step})
    missing: list[list[int]] = []
    was_logged = True
    for step in _logged_steps(end, config.training.log_every, segments):
        if step in logged:
            was_logged = True
            continue
        if was_logged:
            missing.append([])
        missing[-1].append(step)
        was_logged = False
    if not missing:
        return []
    changed = any(c.key.startswith("monitoring.") for s in segments for c in s.changes)
    first, last = missing[0][0], missing[0][-1]
    count = sum(map(len, missing))
    what = "1 logged step is" if count == 1 else f"{count:,} logged steps are"
    where = f"{first:,}" if first == last else f"{first:,} to {last:,}"
    more = f", and {len(missing) - 1} more further on" if len(missing) > 1 else ""
    return [("note" if changed else "damaged", f"{what} missing: {where}{more}")]


def _logged_steps(end: int, log_every: int, segments: Sequence[Segment]) -> Iterator[int]:
    """The steps up to ``end`` that a run logs: the first, and every n-th in each segment."""
    stretches = [(0, log_every)]
    is_known = False
    for segment in segments:
        # A resume dropped what was logged after its step.
        stretches = [known for known in stretches if known[0] < segment.from_step] or stretches[:1]
        for change in segment.changes:
            if change.key == "training.log_every":
                if not is_known:
                    stretches, is_known = [(0, int(change.before))], True
                stretches.append((segment.from_step, int(change.after)))
    stretches.append((end, 1))
    if end > 0:
        yield 1
    for (begin, every), (stop, _) in pairwise(stretches):
        first = (begin // every + 1) * every
        yield from (step for step in range(first, stop + 1, every) if step > 1)


def _lines(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"line {numbers[0]:,}"
    listed = ", ".join(f"{number:,}" for number in numbers[:3])
    return f"{len(numbers):,} lines ({listed}{', ...' if len(numbers) > 3 else ''})"
