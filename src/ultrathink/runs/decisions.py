"""``decisions.jsonl``: what was changed in a run, by whom and why, and what came of it.

A decision whose outcome became known is written again with it; the last line of a number counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultrathink.core.files import write_atomic

ROLLBACK = "rollback"  # the action that takes a run back


def state_name(number: int, key: int | None = None) -> str:
    """The folder, below ``states``, of the run's state when decision ``number`` was taken, or of
    the snapshot ``key`` that it needs."""
    return f"{number:05}" if key is None else f"{number:05}-{key:05}"


def decision_of(name: str) -> int:
    """The number of the decision that a folder of ``states`` belongs to."""
    return int(name.partition("-")[0])


def add_to_decision(path: Path, number: int, **values: Any) -> None:
    """Write more into the record of a decision; the run must not be training."""
    records = read_decisions(path)
    for record in records:
        if record.get("id") == number:
            record.update(values)
    _write(path, records)


def read_decisions(path: Path) -> list[dict[str, Any]]:
    """Every record, each decision as it was written last; lines that are torn are left out."""
    if not path.is_file():
        return []
    records: dict[int | str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            key = record.get("id")
            records[key if isinstance(key, int) else f"line {number}"] = record
    return list(records.values())


def fold_decisions(path: Path) -> None:
    """Leave one line for each decision."""
    records = read_decisions(path)
    if records and len(records) < len(path.read_bytes().splitlines()):
        _write(path, records)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
