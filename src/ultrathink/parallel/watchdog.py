"""Ends a process that hangs, and leaves the stacks of its threads."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import TextIO

# Compiling, and whatever else comes before the first step, may take so many times as long.
FIRST_STEP_FACTOR = 10
# Between the stacks and the end: the end of one process is that of all, and each has stacks to
# leave.
_GRACE_S = 2.0
_LOOK_S = 0.25
STATUS = 74


class Watchdog:
    """Ends this process with status 74 when ``feed`` is not called for ``seconds``.

    The stacks of all threads go to ``path`` first. That is the work of a thread which needs no
    lock of the interpreter, so that one who holds it in some library's code does not hinder it;
    such a process is then ended by the launcher, when the others end, which wait for it.
    """

    def __init__(self, seconds: float, path: Path) -> None:
        self.seconds = seconds
        self.path = path
        self._file: TextIO | None = None
        self._deadline = 0.0
        self._stopped = threading.Event()

    def feed(self, factor: float = 1.0) -> None:
        """Begin to wait anew, for ``factor`` times as long as usual."""
        seconds = self.seconds * factor
        self._deadline = time.monotonic() + seconds + _GRACE_S
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._stopped.clear()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def stop(self) -> None:
        """Wait no more."""
        if self._file is not None:
            self._stopped.set()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            if time.monotonic() >= self._deadline:
                os._exit(STATUS)
