"""The permanent record of a run, one JSON object a line.

``metrics.jsonl`` has the figures, ``experts.jsonl`` those of experts, ``samples.jsonl`` texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrathink.core.files import write_atomic
from ultrathink.monitoring.appending import ResilientAppender
from ultrathink.monitoring.records import MetricRecord, Note, RunInfo, Sink

if TYPE_CHECKING:
    from ultrathink.monitoring.experts import ExpertRecord

METRICS_FILE = "metrics.jsonl"
EXPERTS_FILE = "experts.jsonl"
SAMPLES_FILE = "samples.jsonl"


class JsonlSink(Sink):
    """Appends every record to the file of its kind, created with the first record.

    Lines that cannot be written wait until they can; the method that tried raises OSError.
    """

    def __init__(self) -> None:
        self._files: dict[str, ResilientAppender] = {}

    def open(self, info: RunInfo) -> None:
        """Drop lines after the step that the run resumes from."""
        for name in (METRICS_FILE, EXPERTS_FILE, SAMPLES_FILE):
            self._files[name] = line_appender(info.folder / name, cut_beyond=info.start_step)
        self._each(ResilientAppender.flush)

    def write(self, record: MetricRecord) -> None:
        self._append(METRICS_FILE, record.to_json())

    def experts(self, record: ExpertRecord) -> None:
        self._append(EXPERTS_FILE, record.to_json())

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._append(SAMPLES_FILE, {"step": step, "prompt": prompt, "text": text})

    def take_notes(self) -> list[Note]:
        return [note for file in self._files.values() for note in file.take_notes()]

    def close(self) -> None:
        self._each(ResilientAppender.close)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        assert self._files, "the sink was not opened"
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        # A byte-level model can write half a surrogate pair, which UTF-8 cannot encode.
        self._files[name].append(f"{line}\n".encode(errors="backslashreplace"))

    def _each(self, action: Callable[[ResilientAppender], None]) -> None:
        failures = []
        for file in self._files.values():
            try:
                action(file)
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]


def line_appender(path: Path, *, cut_beyond: int | None = None) -> ResilientAppender:
    """An appender for lines, which may first drop those after the step ``cut_beyond``."""
    cut = partial(cut_after, path, cut_beyond) if cut_beyond is not None else None
    return ResilientAppender(lambda: path, prepare=cut)


def cut_after(path: Path, step: int) -> int:
    """Drop the lines whose ``step`` exceeds ``step``, and torn ones; returns their number.

    A missing file is left alone, and an object without ``step`` stays.
    """
    if not path.is_file():
        return 0
    lines = list(read_lines(path))
    kept = [line for line, value in lines if _belongs(line, value, step)]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file, and the object in it; nothing for a missing file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            yield line, parse_object(line)


def parse_object(line: bytes | str) -> dict[str, Any] | None:
    """The object in a line; None for a torn line or another value."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, dict) else None


def finite_number(value: Any) -> float | None:
    """``value`` where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer larger than any float
        return None


def _belongs(line: bytes, value: dict[str, Any] | None, step: int) -> bool:
    if value is None or not line.endswith(b"\n"):
        return False
    return not isinstance(value.get("step"), int) or value["step"] <= step
