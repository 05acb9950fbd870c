"""The segments of a run, one for each start: what changed, and the step it resumed from.

``segments.jsonl`` has one JSON object per line, appended at every start; none is ever removed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultrathink.config.options import Effect
from ultrathink.config.reflection import rule_of
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import sync_folder
from ultrathink.monitoring.jsonl import parse_object, read_lines


@dataclass(frozen=True)
class ConfigChange:
    """One value of the configuration, before and after."""

    key: str
    before: Any
    after: Any
    felt: bool = True  # it affects training; otherwise the updates are the same

    @property
    def decides(self) -> frozenset[Effect]:
        """What depends on the changed value."""
        return rule_of(Config, self.key).decides

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


@dataclass(frozen=True)
class Segment:
    """One start of a run; ``from_step`` is 0 for the first."""

    from_step: int
    changes: tuple[ConfigChange, ...] = ()
    reset: tuple[str, ...] = ()  # optimizer, schedule, data
    notes: tuple[str, ...] = ()  # other differences: the text, the machine
    environment: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)  # unix seconds
    command: tuple[str, ...] = field(
        default_factory=lambda: (Path(sys.argv[0]).name, *sys.argv[1:])
    )

    @property
    def felt(self) -> tuple[ConfigChange, ...]:
        """The changes that affect training."""
        return tuple(change for change in self.changes if change.felt)


def append_segment(path: Path, segment: Segment) -> None:
    """Add a line to ``segments.jsonl``, and flush it to the disk."""
    line = json.dumps(asdict(segment), ensure_ascii=False) + "\n"
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash tore the last line
                line = "\n" + line
        file.write(line.encode("utf-8", "surrogateescape"))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def read_segments(path: Path) -> list[Segment]:
    """Every start of a run, oldest first; a torn line is skipped."""
    # A path in a command may not be UTF-8; the rest of its line is still valid.
    rows = (parse_object(line.decode(errors="replace")) for line, _ in read_lines(path))
    return [_from_plain(row, path) for row in rows if row is not None]


def differences(before: Config, after: Config) -> list[ConfigChange]:
    """The values that differ and are compared, by dotted key.

    A list, and a part whose ``type`` differs, is one value.
    """
    found = _differences(before.model_dump(mode="json"), after.model_dump(mode="json"), "")
    rules = {key: rule_of(Config, key) for key, *_ in found}
    return [
        ConfigChange(key, then, now, felt=rules[key].rule != "free")
        for key, then, now in found
        if rules[key].is_compared
    ]


def _differences(before: Any, after: Any, key: str) -> list[tuple[str, Any, Any]]:
    if before == after:
        return []
    are_sections = isinstance(before, dict) and isinstance(after, dict)
    if not are_sections or before.get("type") != after.get("type"):
        return [(key, before, after)]
    return [
        change
        for name in dict.fromkeys([*before, *after])
        for change in _differences(
            before.get(name), after.get(name), f"{key}.{name}" if key else name
        )
    ]


def _from_plain(plain: dict[str, Any], path: Path) -> Segment:
    try:
        return Segment(
            from_step=int(plain["from_step"]),
            changes=tuple(ConfigChange(**change) for change in plain["changes"]),
            reset=tuple(plain["reset"]),
            notes=tuple(plain["notes"]),
            environment=dict(plain["environment"]),
            time=float(plain["time"]),
            command=tuple(plain["command"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged (a line lacks or garbles {error}); remove that line."
        ) from None


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
