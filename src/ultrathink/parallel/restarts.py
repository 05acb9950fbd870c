"""What a process that was started again must know of the run that it belongs to."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ultrathink.core.files import write_atomic
from ultrathink.parallel.world import RUN_POINTER_VARIABLE, World


def restart_count() -> int:
    """How often the launcher (ours, or torchrun) has started all processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def remember_run(path: Path, world: World) -> None:
    """Leave a word for who is started in this process's place: the run that it trains."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and world.local_rank == 0:
        pointer = _pointer()
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(pointer, str(path.resolve()))


def run_to_go_on_with() -> Path | None:
    """The run that was trained when the processes were last started; None at the first start."""
    if restart_count() == 0:
        with suppress(OSError):  # of another launcher with the same process number, long ago
            _pointer().unlink()
        return None
    try:
        return Path(_pointer().read_text(encoding="utf-8"))
    except OSError:
        return None  # it ended before there was a run folder


def _pointer() -> Path:
    given = os.environ.get(RUN_POINTER_VARIABLE)
    if given:
        return Path(given)
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"ultrathink-{user}" / f"run-{os.getppid()}"
