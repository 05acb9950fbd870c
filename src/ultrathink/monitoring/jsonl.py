"""The lasting record of a run, one JSON object a line.

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
    """Appends every record to the file of its kind, which is made when the first one comes.

    What cannot be written waits until it can; the method that tried raises OSError.
    """

    def __init__(self) -> None:
        self._files: dict[str, ResilientAppender] = {}

    def open(self, info: RunInfo) -> None:
        """Drop what lies beyond the step that the run continues from, and begin to append."""
        for name in (METRICS_FILE, EXPERTS_FILE, SAMPLES_FILE):
            self._files[name] = line_appender(info.folder / name, cut_beyond=info.start_step)
        self._each(ResilientAppender.flush)

    def write(self, record: MetricRecord) -> None:
        """Append one line."""
        self._append(METRICS_FILE, record.to_json())

    def experts(self, record: ExpertRecord) -> None:
        """Append one line with every figure, and the load of every expert."""
        self._append(EXPERTS_FILE, record.to_json())

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append one line with the prompt and what the model wrote after it."""
        self._append(SAMPLES_FILE, {"step": step, "prompt": prompt, "text": text})

    def take_notes(self) -> list[Note]:
        """What befell the files."""
        return [note for file in self._files.values() for note in file.take_notes()]

    def close(self) -> None:
        """Write what still waits."""
        self._each(ResilientAppender.close)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        assert self._files, "the sink was not opened"
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair, which a byte-level model can write, has no UTF-8 form.
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
    """An appender for lines, which may first drop those that lie ``cut_beyond`` a step."""
    cut = partial(cut_after, path, cut_beyond) if cut_beyond is not None else None
    return ResilientAppender(lambda: path, prepare=cut)


def cut_after(path: Path, step: int) -> int:
    """Drop the lines whose ``step`` exceeds ``step``, and torn ones; returns how many went.

    A file that does not exist, or has nothing to drop, is left alone. Works for any file of one
    JSON object a line; an object without ``step`` stays.
    """
    if not path.is_file():
        return 0
    lines = list(read_lines(path))
    kept = [line for line, value in lines if _belongs(line, value, step)]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file with its end, and the object that it holds; no file, no lines."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            yield line, parse_object(line)


def parse_object(line: bytes | str) -> dict[str, Any] | None:
    """The object on a line; None where a crash left half of one, or it holds another thing."""
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
    except OverflowError:  # a whole number beyond all floats
        return None


def _belongs(line: bytes, value: dict[str, Any] | None, step: int) -> bool:
    if value is None or not line.endswith(b"\n"):
        return False
    return not isinstance(value.get("step"), int) or value["step"] <= step
