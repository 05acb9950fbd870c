"""The lasting record of a run: ``metrics.jsonl`` and ``samples.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from ultrathink.core.files import write_atomic
from ultrathink.monitoring.records import BaseSink, MetricRecord, RunInfo

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


class JsonlSink(BaseSink):
    """Appends every record to ``metrics.jsonl`` and every sample to ``samples.jsonl``."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files: dict[str, IO[str]] = {}

    def open(self, info: RunInfo) -> None:
        """Drop what lies beyond the step that the run continues from, and begin to append."""
        info.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, SAMPLES_FILE):
            cut_after(info.folder / name, info.start_step)
        self._folder = info.folder

    def write(self, record: MetricRecord) -> None:
        """Append one line."""
        self._append(METRICS_FILE, record.to_json())

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append one line with the prompt and what the model wrote after it."""
        self._append(SAMPLES_FILE, {"step": step, "prompt": prompt, "text": text})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        assert self._folder is not None, "the sink was not opened"
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        if name not in self._files:
            # Half of a surrogate pair, which a byte-level model can write, has no UTF-8 form.
            self._files[name] = (self._folder / name).open(
                "a", encoding="utf-8", errors="backslashreplace", newline="\n"
            )
        self._files[name].write(line + "\n")
        self._files[name].flush()


def cut_after(path: Path, step: int) -> int:
    """Drop the lines whose ``step`` exceeds ``step``, and torn ones; returns how many went.

    A file that does not exist, or has nothing to drop, is left alone. Works for any file of one
    JSON object a line; an object without ``step`` stays.
    """
    if not path.is_file():
        return 0
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, step)]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def read_records(path: Path) -> list[MetricRecord]:
    """Every metric record of a ``metrics.jsonl``, a torn last line left out."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        value = _parse(line)
        if value is not None:
            records.append(MetricRecord.from_json(value))
    return records


def _belongs(line: bytes, step: int) -> bool:
    value = _parse(line)
    return value is not None and (not isinstance(value.get("step"), int) or value["step"] <= step)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None where a crash left half of one (no newline, or no JSON)."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return value if isinstance(value, dict) else None
