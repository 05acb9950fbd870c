"""The record that a process which ran out of memory leaves in the run folder for the restart."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ultrathink.core.files import write_atomic
from ultrathink.runs.folder import RunFolder

_FILE = "out_of_memory.json"


@dataclass(frozen=True)
class OutOfMemory:
    """A step that did not fit into memory, and the micro-batch size to resume with."""

    step: int
    rank: int  # of the process that ran out of memory
    before: int  # micro-batch size that failed
    after: int
    problem: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_out_of_memory(run: RunFolder, record: OutOfMemory) -> None:
    """Write ``record``, in place of an earlier one."""
    write_atomic(run.path / _FILE, json.dumps(record.to_dict()) + "\n")


def read_out_of_memory(run: RunFolder) -> OutOfMemory | None:
    """The last record of ``run``; None if there is none or it cannot be read."""
    try:
        return OutOfMemory(**json.loads((run.path / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove_out_of_memory(run: RunFolder) -> None:
    """Let the next start use the configured micro-batch size."""
    (run.path / _FILE).unlink(missing_ok=True)
