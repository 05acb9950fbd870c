"""Reads a run's files, which may be torn or being written, without torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ultrathink.checkpoint.format import has_its_sizes, read_state
from ultrathink.config.loading import CONFIG_FILE, ORIGINS_FILE
from ultrathink.config.yaml_format import parse_yaml
from ultrathink.core.errors import CheckpointError
from ultrathink.monitoring.jsonl import finite_number, parse_object, read_lines
from ultrathink.monitoring.records import MetricRecord
from ultrathink.runs.decisions import DecisionRecord, is_decision, last_of_each
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import Segment, read_segments

# The last validation is searched in this part at the end of a metrics file, about ten thousand
# lines. Searching further would make a list of many runs slow.
SEARCHED_BYTES = 4 * 2**20
_BLOCK_BYTES = 2**16
_HEAD = re.compile(rb'\{"step": (\d+), "split": "(train|val)", .*\}\n$')  # as records are written

Found = TypeVar("Found")
Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A text generated after ``prompt``."""

    step: int
    prompt: str
    text: str


def has_step(row: Mapping[str, Any]) -> bool:
    """Whether an object has a step."""
    return finite_number(row.get("step")) is not None


class RunReader:
    """Reads the files of a run, each on demand.

    Torn or invalid lines are skipped and counted in ``num_damaged``, by file name; a missing file
    of lines is empty. Other files raise CheckpointError if they are missing or damaged, and all
    raise OSError if they cannot be read: ``attempt`` adds that to ``problems`` and returns None.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.problems: list[str] = []
        self.num_damaged: dict[str, int] = {}
        self._torn: set[str] = set()  # files whose last line is incomplete
        self._config: dict[str, Any] | None = None

    @property
    def notes(self) -> list[str]:
        """What could not be read so far, in sentences."""
        lines = {True: "line is", False: "lines are"}
        return [
            *(f"{problem}." for problem in dict.fromkeys(self.problems)),
            *(f"{name}: the last line is torn and left out." for name in sorted(self._torn)),
            *(
                f"{name}: {count:,} {lines[count == 1]} damaged and left out."
                for name, count in self.num_damaged.items()
                if count
            ),
        ]

    def attempt(self, read: Callable[[], Found]) -> Found | None:
        """The result of ``read``; None if a file is missing, damaged or unreadable."""
        try:
            return read()
        except (CheckpointError, OSError) as error:
            self.problems.append(in_run(self.run, error))
            return None

    # -- files that hold one thing -----------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The configuration as nested mappings, not validated: plugins may be missing."""
        if self._config is None:
            path = self.run.path / CONFIG_FILE
            self._config = _whole(path, lambda data: parse_yaml(data.decode("utf-8")), "sections")
        return self._config

    def orchestrator_mode(self) -> str:
        """``orchestrator.mode``; ``off`` where the configuration does not have it."""
        section = self.config().get("orchestrator")
        mode = section.get("mode") if isinstance(section, dict) else None
        return mode if isinstance(mode, str) else "off"

    def config_text(self) -> str:
        """The text of the configuration."""
        return (self.run.path / CONFIG_FILE).read_text(encoding="utf-8")

    def origins(self) -> dict[str, str] | None:
        """The origin of each value of the configuration; None if unknown."""
        try:
            tree = parse_yaml((self.run.path / ORIGINS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return {str(k): str(v) for k, v in tree.items()} if isinstance(tree, dict) else None

    def manifest(self) -> dict[str, Any]:
        """The code, packages, hardware and data of the run."""
        return _whole(self.run.manifest, json.loads, "object")

    def data_record(self) -> dict[str, Any]:
        """The record of the run's training text."""
        return _whole(self.run.data_record, json.loads, "object")

    def planned_steps(self, state: Mapping[str, Any] | None = None) -> int | None:
        """The length of the run: the configuration's, else that of a checkpoint's ``state``.

        None if neither has it. The configuration is newer if the run was extended.
        """
        try:
            training = self.config().get("training")
        except CheckpointError:
            training = None
        known = training if isinstance(training, dict) else {}
        budget = (state or {}).get("budget") or {}
        total = known.get("max_steps") or known.get("step_budget") or budget.get("total_steps")
        return total if isinstance(total, int) else None

    def last_state(self) -> dict[str, Any]:
        """The state of the newest checkpoint without tensors; empty if there is no checkpoint.

        Raises CheckpointError if it cannot be used; a missing file or one of another size is added
        to ``problems``.
        """
        steps = self.run.step_folders()
        if not steps:
            return {}
        folder = self.run.step_path(steps[-1])
        state = read_state(folder)
        if not has_its_sizes(folder):
            self.problems.append(
                f"checkpoints/{folder.name} is incomplete: a file is missing or has another size"
            )
        return state

    # -- files of lines ----------------------------------------------------------------------------

    def rows(self, path: Path, is_one: Callable[[Row], bool] = has_step) -> Iterator[Row]:
        """The objects in the lines of a file that ``is_one`` accepts; the others are counted."""
        self._begin(path)
        for line, row in read_lines(path):
            if row is not None and is_one(row):
                yield row
            elif line.strip():
                self._leave_out(path, line)

    def metric_lines(self) -> Iterator[tuple[bytes, MetricRecord | None]]:
        """Each line of the metrics with its record, or None if it is torn or invalid."""
        self._begin(self.run.metrics)
        for line, row in read_lines(self.run.metrics):
            record = _record(line, row)
            if record is None:
                self._leave_out(self.run.metrics, line)
            yield line, record

    def history(self) -> list[MetricRecord]:
        """The valid metrics, in order.

        If steps decrease, as after a rollback, the earlier records from that step on were undone
        and are skipped.
        """
        records: list[MetricRecord] = []
        for _, record in self.metric_lines():
            if record is not None:
                kept = len(records)
                while kept and records[kept - 1].step >= record.step:
                    kept -= 1
                records[kept:] = [one for one in records[kept:] if not is_undone(one, record)]
                records.append(record)
        return records

    def last_records(self) -> dict[str, MetricRecord]:
        """The last record of training and of validation, read from the end of the metrics.

        A split is missing if none of its lines is complete, or all are further than
        ``SEARCHED_BYTES`` from the end; steps undone by a rollback do not count.
        """
        found: dict[str, MetricRecord] = {}
        first = {"train": math.inf, "val": math.inf}  # the lowest step of each among later lines
        for line in _lines_backwards(self.run.metrics):
            head = _HEAD.match(line)
            if head is not None and (split := head[2].decode()) in found:
                first[split] = min(first[split], int(head[1]))
                continue  # not parsed: there are many
            record = _record(line, parse_object(line))
            if record is None or record.split == "eval":
                continue
            undone = record.step >= first["train"] or record.step > first["val"]
            first[record.split] = min(first[record.split], record.step)
            if not undone:
                found.setdefault(record.split, record)
            if len(found) == 2:
                break
        return found

    def decisions(self) -> list[DecisionRecord]:
        """The changes to the run, the last record of each decision."""
        rows = last_of_each(self.rows(self.run.decisions, is_decision))
        return [DecisionRecord.from_json(number, row) for number, row in enumerate(rows, 1)]

    def samples(self) -> list[Sample]:
        """The texts that the model generated during training."""
        return [
            Sample(int(row["step"]), str(row.get("prompt") or ""), str(row.get("text") or ""))
            for row in self.rows(self.run.samples)
        ]

    def segments(self) -> list[Segment]:
        """Every start of the run, oldest first."""
        return read_segments(self.run.segments)

    def _begin(self, path: Path) -> None:
        self.num_damaged[path.name] = 0
        self._torn.discard(path.name)

    def _leave_out(self, path: Path, line: bytes) -> None:
        if line.endswith(b"\n"):
            self.num_damaged[path.name] += 1
        else:
            self._torn.add(path.name)


def is_undone(earlier: MetricRecord, later: MetricRecord) -> bool:
    """Whether ``later`` undid ``earlier``: any record at or after its step, except that a step's
    validation and evaluations follow it, the latter in several lines of different figures."""
    if earlier.step != later.step:
        return earlier.step > later.step
    if earlier.split == later.split == "eval":
        return not earlier.values.keys() & later.values.keys() <= {"tokens"}
    return earlier.split == later.split or later.split == "train"


def in_run(run: RunFolder, error: Exception) -> str:
    """An error's message as part of a line about its run."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fspath(error.filename)} " if error.filename else ""
        text = f"{place}cannot be read: {error.strerror}"
    return text.replace(f"{run.path}{os.sep}", "").replace("\n", " ").rstrip(".")


def _whole(path: Path, parse: Callable[[bytes], Any], content: str) -> dict[str, Any]:
    """The mapping in a file; CheckpointError if it is missing or invalid."""
    try:
        value = parse(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not of that language, or not UTF-8
        raise CheckpointError(f"{path} is damaged ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged (it holds no {content}).")
    return value


def _record(line: bytes, row: Row | None) -> MetricRecord | None:
    """The record of a line; None if the line is incomplete."""
    return MetricRecord.from_json(row) if row is not None and line.endswith(b"\n") else None


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines near the end of a file, last first, without one cut off by the limit.

    Lines appended after the start are not included.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        limit = max(0, position - SEARCHED_BYTES)
        rest = b""
        while position > limit:
            size = min(_BLOCK_BYTES, position - limit)
            position -= size
            file.seek(position)
            first, *lines = (file.read(size) + rest).splitlines(keepends=True)
            yield from reversed(lines)
            rest = first
        if position == 0 and rest:
            yield rest
