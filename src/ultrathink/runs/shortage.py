"""What a process that ran out of memory leaves in the run folder for the next start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ultrathink.core.files import write_atomic
from ultrathink.runs.folder import RunFolder

_FILE = "out_of_memory.json"


@dataclass(frozen=True)
class Shortage:
    """A step that did not fit, and the micro-batch to go on with from a checkpoint before it."""

    step: int
    rank: int  # of the process that ran out of memory
    before: int
    after: int
    problem: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_shortage(run: RunFolder, shortage: Shortage) -> None:
    """Leave word of ``shortage``; it replaces an earlier one."""
    write_atomic(run.path / _FILE, json.dumps(shortage.to_dict()) + "\n")


def read_shortage(run: RunFolder) -> Shortage | None:
    """The last one of ``run``; None where there was none, or its file cannot be read."""
    try:
        return Shortage(**json.loads((run.path / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def forget_shortage(run: RunFolder) -> None:
    """Let the next start take the micro-batch that it is configured with."""
    (run.path / _FILE).unlink(missing_ok=True)
