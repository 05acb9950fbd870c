"""Writes checkpoints in a thread beside the training thread."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from ultrathink.checkpoint.format import WHOLE_MODEL, Header, save_checkpoint
from ultrathink.checkpoint.snapshots import EmbeddedSnapshot, SnapshotWriter
from ultrathink.core.protocols import State
from ultrathink.core.store import LocalStore, SharedStore

_POLL_S = 0.1  # while waiting for a save; signals are handled between polls
# Of the writing thread: it takes about 1/30 of a core beside training. At 10 training lost 1/9 of
# the time that writing took; at 19 a checkpoint takes twice as long and costs no less.
_NICENESS = 15
_EXIT_S = 10.0  # at exit, how long an abandoned save may take to notice


class CheckpointFolder(Protocol):
    """The folder of a run's checkpoints: ``RunFolder``, which is of a higher layer."""

    @property
    def checkpoints(self) -> Path: ...

    def step_path(self, step: int) -> Path: ...

    def founding(self) -> dict[str, bytes]: ...

    def restore_founding(self, files: dict[str, bytes]) -> bool: ...

    def save(
        self,
        step: int,
        state: State,
        *,
        is_best: bool,
        keep: int,
        store: SharedStore | None,
        write: Callable[..., None],
    ) -> Path: ...


class SaveAbandonedError(Exception):
    """The save was abandoned."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended: ``path`` is complete if ``error`` is None.

    ``restored``: the run folder, or files that its checkpoints need, had vanished and were
    rewritten.
    """

    step: int
    path: Path
    is_best: bool
    seconds: float
    error: Exception | None
    restored: bool


@dataclass(eq=False)
class _Save:
    step: int
    state: State
    is_best: bool
    store: SharedStore
    embedded: Sequence[EmbeddedSnapshot]
    abandoned: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.abandoned.is_set():
            raise SaveAbandonedError(f"the save of step {self.step} was abandoned")

    def wait(self) -> None:
        while not self.done.wait(_POLL_S):
            pass


class CheckpointSaver:
    """Writes one checkpoint at a time, with ``header``, each in its own thread.

    Only the training thread may call its methods. Errors are reported as outcomes, never raised.
    """

    def __init__(self, run: CheckpointFolder, keep: int, header: Header = WHOLE_MODEL) -> None:
        self._run = run
        self._keep = keep
        self._header = header
        self.snapshots = SnapshotWriter(run.checkpoints)
        self._founding = run.founding()
        self._outcomes: list[Outcome] = []
        self._outcomes_lock = threading.Lock()
        self._newest: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is running that was not abandoned."""
        save = self._newest
        return save is not None and not save.done.is_set() and not save.abandoned.is_set()

    def submit(
        self,
        step: int,
        state: State,
        *,
        is_best: bool,
        store: SharedStore | None = None,
        embedded: Sequence[EmbeddedSnapshot] = (),
    ) -> None:
        """Write ``state``, which must not change any more, after the current save has ended.

        All processes that share ``store`` call it, each with its own shards. The snapshots
        ``embedded`` go into the checkpoint.
        """
        if self._newest is not None:
            self._newest.wait()
        save = _Save(step, state, is_best, store or LocalStore(), embedded)
        self._newest = save
        _WRITING.add(save)
        thread = threading.Thread(
            target=self._write, args=(save,), name=f"checkpoint {step}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._end(save, time.perf_counter(), error, restored=False)

    def outcomes(self) -> list[Outcome]:
        """The saves that ended since the last call, in order, without abandoned ones."""
        with self._outcomes_lock:
            taken, self._outcomes = self._outcomes, []
        return taken

    def wait(self) -> None:
        """Return when no save is running."""
        if self.busy and self._newest is not None:
            self._newest.wait()

    def close(self, wait: bool = True) -> None:
        """Wait for the running save, or abandon it and wait until it notices.

        Another process may use the run folder only after this.
        """
        if wait:
            self.wait()
        elif self._newest is not None:
            self._newest.abandoned.set()
            self._newest.done.wait(_EXIT_S)

    def _write(self, save: _Save) -> None:
        began, restored = time.perf_counter(), False
        error: Exception | None = None
        _lower_priority()
        try:
            if save.store.rank == 0:
                restored = self._run.restore_founding(self._founding)
                with suppress(OSError):  # they change: the chosen length, the segments
                    self._founding.update(self._run.founding())
            self._run.save(
                save.step,
                save.state,
                is_best=save.is_best,
                keep=self._keep,
                store=save.store,
                write=partial(
                    save_checkpoint,
                    check=save.check,
                    store=save.store,
                    add=partial(self.snapshots.write, save.embedded),
                    header=self._header,
                ),
            )
        except BaseException as caught:  # else it is lost, and all processes wait for ever
            _forget_locals(caught)
            error = caught if isinstance(caught, Exception) else RuntimeError(repr(caught))
        finally:
            self._end(save, began, error, restored)

    def _end(self, save: _Save, began: float, error: Exception | None, restored: bool) -> None:
        save.state, save.embedded = {}, ()
        if not isinstance(error, SaveAbandonedError):
            path, seconds = self._run.step_path(save.step), time.perf_counter() - began
            outcome = Outcome(save.step, path, save.is_best, seconds, error, restored)
            with self._outcomes_lock:
                self._outcomes.append(outcome)
        save.done.set()


def _lower_priority() -> None:
    """Lower the priority of this thread, on systems that have priorities of threads.

    Training on a CPU uses all cores and waits for the slowest: a writer of equal priority delays
    it by twice its own work.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


_WRITING: weakref.WeakSet[_Save] = weakref.WeakSet()


@atexit.register
def _end_writing() -> None:
    """Finish running saves before the interpreter shuts down, which would abort the process.

    Abandoned saves only get time to notice.
    """
    for save in _WRITING.copy():
        if save.abandoned.is_set():
            save.done.wait(_EXIT_S)
        else:
            save.wait()


def _forget_locals(error: BaseException | None) -> None:
    """Keep the traceback of an error, but not its local variables, which hold a whole state."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
