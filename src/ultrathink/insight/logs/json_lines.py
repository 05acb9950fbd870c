"""Lines of JSON: our own ``metrics.jsonl``, and what others write, one object a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrathink.insight.logs.line_log import LineLog, LineReader
from ultrathink.insight.logs.log import LogSignals
from ultrathink.insight.logs.names import Meaning
from ultrathink.insight.logs.rows import Rows
from ultrathink.monitoring.jsonl import METRICS_FILE, parse_object
from ultrathink.monitoring.records import MetricRecord

_SAMPLE_LINES = 200
_OURS_EXTRA = {"token_accuracy": Meaning("accuracy")}


class JsonReader(LineReader):
    """Reads lines that hold one object each."""

    def feed(self, line: str) -> list[LogSignals]:
        """The signals of a line."""
        if not line.strip():
            return []
        row = parse_object(line)
        return self.taken(None if row is None else flat(row))


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as ``train/loss``; a list of one number as that number."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}/")
        else:
            values[prefix + name] = value[0] if isinstance(value, list) and value else value
    return values


def is_ours(row: Mapping[str, Any]) -> bool:
    """Whether an object is a line of a run's ``metrics.jsonl``."""
    return {"step", "split", "time"} <= row.keys() and row["split"] in ("train", "val")


class _OurRows(Rows):
    """Rows of ``metrics.jsonl``: evaluators give their figures names of their own."""

    def take(self, row: Mapping[str, Any]) -> LogSignals | None:
        record = MetricRecord.from_json(row) if row.get("split") == "eval" else None
        if record is None:
            return super().take(row)
        figures = {name: value for name, value in record.values.items() if name != "tokens"}
        return LogSignals(record.step, {f"eval/{name}": one for name, one in figures.items()})


def our_rows() -> Rows:
    """What reads the lines of ``metrics.jsonl``, where null is a value that was not finite."""
    return _OurRows(extra=_OURS_EXTRA, null_is_nan=True)


def open_json_lines(path: Path, lines: Sequence[str], columns: Mapping[str, str]) -> LineLog:
    """The log in lines of JSON; LogError where its keys cannot be guessed."""
    sample = [row for line in lines[:_SAMPLE_LINES] if (row := parse_object(line)) is not None]
    if is_ours(sample[0]) and not columns:
        return LineLog(path, METRICS_FILE, lambda: JsonReader(our_rows()))
    rows = Rows(columns)
    rows.require((flat(row) for row in sample), path)

    def make_reader() -> JsonReader:
        return JsonReader(Rows(columns, has_sources=rows.has_sources))

    return LineLog(path, "lines of JSON", make_reader)
