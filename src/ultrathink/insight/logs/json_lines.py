"""Lines of JSON: our own ``metrics.jsonl``, and what others write, one object a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrathink.insight.logs.line_log import SAMPLE_LINES, LineLog, RowReader, log_of_rows
from ultrathink.insight.logs.log import LogSignals
from ultrathink.insight.logs.names import Meaning
from ultrathink.insight.logs.rows import Rows
from ultrathink.monitoring.jsonl import METRICS_FILE, parse_object
from ultrathink.monitoring.records import MetricRecord

_OURS_EXTRA = {"token_accuracy": Meaning("accuracy")}


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as ``train/loss``; a list of one number as that number."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}/")
        else:
            values[prefix + name] = value[0] if isinstance(value, list) and value else value
    return values


class _OurRows(Rows):
    """Rows of ``metrics.jsonl``, with what evaluators found under the names of live signals."""

    def take(self, row: Mapping[str, Any]) -> LogSignals | None:
        record = MetricRecord.from_json(row) if row.get("split") == "eval" else None
        if record is None:
            return super().take(row)
        figures = {name: value for name, value in record.values.items() if name != "tokens"}
        return LogSignals(record.step, {f"eval/{name}": one for name, one in figures.items()})


def our_log(path: Path) -> LineLog:
    """A run's ``metrics.jsonl``, where null is a value that was not finite."""

    def make_reader() -> RowReader:
        return RowReader(_OurRows(extra=_OURS_EXTRA, null_is_nan=True), _row)

    return LineLog(path, METRICS_FILE, make_reader)


def open_json_lines(path: Path, lines: Sequence[str], columns: Mapping[str, str]) -> LineLog:
    """The log in lines of JSON; LogError where its keys cannot be guessed."""
    first = parse_object(lines[0]) or {}
    is_ours = {"step", "split", "time"} <= first.keys() and first["split"] in ("train", "val")
    if is_ours and not columns:
        return our_log(path)
    return log_of_rows(path, "lines of JSON", _row, lines[:SAMPLE_LINES], columns)


def _row(line: str) -> dict[str, Any] | None:
    row = parse_object(line) if line.strip() else {}
    return None if row is None else flat(row)
