"""Lets restarted processes find the run that they belong to."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ultrathink.core.files import write_atomic
from ultrathink.parallel.world import RUN_POINTER_VARIABLE, World


def remember_run(path: Path, world: World) -> None:
    """Record the run for a process that is restarted in place of this one."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and world.local_rank == 0:
        pointer = _pointer()
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(pointer, str(path.resolve()))


def run_to_resume() -> Path | None:
    """The run of the processes before a restart; None at the first start."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        with suppress(OSError):  # left by an earlier launcher with the same process id
            _pointer().unlink()
        return None
    try:
        return Path(_pointer().read_text(encoding="utf-8"))
    except OSError:
        return None  # it ended before it had a run folder


def _pointer() -> Path:
    given = os.environ.get(RUN_POINTER_VARIABLE)
    if given:
        return Path(given)
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"ultrathink-{user}" / f"run-{os.getppid()}"
