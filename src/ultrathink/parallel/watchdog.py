"""Ends a process that hangs, and writes the stacks of its threads."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import TextIO

# Factor of the time limit before the first step, for compilation and other preparations.
FIRST_STEP_FACTOR = 10
# Pause between writing the stacks and ending: the end of one process ends all of them, and each
# must write its stacks.
_GRACE_S = 2.0
_POLL_S = 0.25
STATUS = 74


class Watchdog:
    """Ends this process with status 74 when ``feed`` is not called for ``seconds``.

    First the stacks of all threads are written to ``path``, by a thread that does not need the
    interpreter's lock, so it works even if a library holds that. Such a process is then ended by
    the launcher, when the others end, which wait for it.
    """

    def __init__(self, seconds: float, path: Path) -> None:
        self.seconds = seconds
        self.path = path
        self._file: TextIO | None = None
        self._deadline = 0.0
        self._stopped = threading.Event()

    def feed(self, factor: float = 1.0) -> None:
        """Restart the countdown, with ``factor`` times the usual limit."""
        seconds = self.seconds * factor
        self._deadline = time.monotonic() + seconds + _GRACE_S
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._stopped.clear()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def stop(self) -> None:
        """Stop the countdown."""
        if self._file is not None:
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_S):
            if time.monotonic() >= self._deadline:
                os._exit(STATUS)
