"""A run's files as they are found: perhaps torn, perhaps being written, and without torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultrathink.config.loading import CONFIG_FILE
from ultrathink.config.yaml_format import parse_yaml
from ultrathink.core.errors import CheckpointError
from ultrathink.monitoring.records import RESERVED, MetricRecord

# From the end of a metrics file, so much is searched for the last validation: some ten thousand
# lines. What lies further back is not worth the time of a list of many runs.
SEARCHED_BYTES = 4 * 2**20
_BLOCK_BYTES = 2**16


def config_tree(run: Path) -> dict[str, Any]:
    """A run's configuration as nested mappings, unchecked: parts of plugins need not be known.

    Raises CheckpointError where the file is missing or holds something else.
    """
    path = run / CONFIG_FILE
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not YAML, or not UTF-8
        raise CheckpointError(f"{path} is damaged ({error}).") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is damaged (it holds no sections).")
    return tree


def json_object(path: Path) -> dict[str, Any]:
    """The one object in a JSON file; CheckpointError where it is missing or holds another thing."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise CheckpointError(f"{path} is damaged ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged (it holds no object).")
    return value


def parse_record(line: bytes) -> MetricRecord | None:
    """The record on a line of ``metrics.jsonl``; None where the line is torn or holds no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("split") not in ("train", "val"):
        return None
    if not _is_number(value.get("step")) or not _is_number(value.get("time")):
        return None
    figures = {
        name: math.nan if figure is None else figure
        for name, figure in value.items()
        if name not in RESERVED and (figure is None or _is_number(figure))
    }
    return MetricRecord(int(value["step"]), value["split"], float(value["time"]), figures)


def last_records(path: Path) -> dict[str, MetricRecord]:
    """The last record of each split in a metrics file, read from its end.

    A split is left out where none of its lines is whole, or all lie further than
    ``SEARCHED_BYTES`` from the end; what a rollback undid does not count. Raises OSError where the
    file cannot be read.
    """
    found: dict[str, MetricRecord] = {}
    for line in _lines_backwards(path):
        if ("val" if b'"val"' in line else "train") in found:
            continue  # not parsed: there are many
        record = parse_record(line)
        if record is None or any(is_undone(record, later) for later in found.values()):
            continue
        found.setdefault(record.split, record)
        if len(found) == 2:
            break
    return found


def history(path: Path) -> list[MetricRecord]:
    """The records of a metrics file that count, in order: torn lines are left out.

    Where the steps go back, as after a rollback, what was noted beyond that step was undone and
    is left out too. A file that does not exist holds none.
    """
    records: list[MetricRecord] = []
    if not path.exists():
        return records
    with path.open("rb") as lines:
        for line in lines:
            record = parse_record(line)
            if record is not None:
                while records and is_undone(records[-1], record):
                    records.pop()
                records.append(record)
    return records


def is_undone(earlier: MetricRecord, later: MetricRecord) -> bool:
    """A step's own validation follows it; anything else at or beyond a later line was undone."""
    if earlier.step == later.step:
        return earlier.split == later.split or later.split == "train"
    return earlier.step > later.step


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines near the end of a file, the last one first; one cut off by the limit is left out.

    Works on what is there when it begins: a line that is appended meanwhile is not seen.
    """
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
