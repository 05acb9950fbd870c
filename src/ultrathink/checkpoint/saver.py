"""Writing checkpoints beside the training thread."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from ultrathink.checkpoint.format import WHOLE_MODEL, Header, Write, save_checkpoint
from ultrathink.checkpoint.snapshots import Carried, SnapshotWriter
from ultrathink.core.protocols import State
from ultrathink.core.store import LocalStore, SharedStore

_LOOK_S = 0.1  # between looks at a save that is waited for; a signal is heard in each
# Of the writing thread: a thirtieth of a core beside training. At 10 training lost a ninth of the
# time that writing took, at 19 a checkpoint takes twice as long and costs no less.
_NICENESS = 15
_EXIT_S = 10.0  # a save that was given up may take so long to notice, before the process ends


class CheckpointFolder(Protocol):
    """Where checkpoints go; ``RunFolder`` is one."""

    @property
    def checkpoints(self) -> Path: ...

    def step_path(self, step: int) -> Path: ...

    def founding(self) -> dict[str, bytes]:
        """The files without which a checkpoint is of no use."""

    def restore_founding(self, files: dict[str, bytes]) -> bool:
        """Write those that are gone again; whether there were any."""

    def save(
        self,
        step: int,
        state: State,
        *,
        is_best: bool,
        keep: int,
        store: SharedStore | None,
        write: Write,
    ) -> Path: ...


class SaveGivenUpError(Exception):
    """A save that was not to be finished."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended: ``path`` is whole where ``error`` is None.

    ``restored`` tells that the run folder, or files without which its checkpoints are of no use,
    had vanished and were written again.
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
    carried: Sequence[Carried]
    given_up: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.given_up.is_set():
            raise SaveGivenUpError(f"the save of step {self.step} was given up")

    def wait(self) -> None:
        while not self.done.wait(_LOOK_S):
            pass


class CheckpointSaver:
    """Writes one checkpoint at a time, each in a thread that ends with it; ``header`` is theirs.

    Its methods are for one thread, the training one. What goes wrong is an outcome, never raised.
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
        """Whether a save is under way that was not given up."""
        save = self._newest
        return save is not None and not save.done.is_set() and not save.given_up.is_set()

    def submit(
        self,
        step: int,
        state: State,
        *,
        is_best: bool,
        store: SharedStore | None = None,
        carried: Sequence[Carried] = (),
    ) -> None:
        """Write ``state``, which nobody else may change, after the current save has ended.

        All processes that share ``store`` call it, each with its own part. The checkpoint will
        hold the snapshots ``carried``.
        """
        if self._newest is not None:
            self._newest.wait()
        save = _Save(step, state, is_best, store or LocalStore(), carried)
        self._newest = save
        _WRITING.add(save)
        thread = threading.Thread(
            target=self._write, args=(save,), name=f"checkpoint {step}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # no more threads are to be had
            self._end(save, time.perf_counter(), error, restored=False)

    def outcomes(self) -> list[Outcome]:
        """The saves that ended since the last call, in order; none of one that was given up."""
        with self._outcomes_lock:
            taken, self._outcomes = self._outcomes, []
        return taken

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._newest is not None and self.busy:
            self._newest.wait()

    def close(self, wait: bool = True) -> None:
        """Wait for the save under way; or give it up, which takes it a moment to notice.

        Only then may another process use the run folder.
        """
        if wait:
            self.wait()
        elif self._newest is not None:
            self._newest.given_up.set()
            self._newest.done.wait(_EXIT_S)

    def _write(self, save: _Save) -> None:
        began, restored = time.perf_counter(), False
        error: Exception | None = None
        _step_back()
        try:
            if save.store.rank == 0:
                restored = self._run.restore_founding(self._founding)
                with suppress(OSError):  # they change: what length was chosen, segments
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
                    add=partial(self.snapshots.write, save.carried),
                    header=self._header,
                ),
            )
        except BaseException as caught:  # nobody else would hear of it, and all would wait
            _forget_locals(caught)
            error = caught if isinstance(caught, Exception) else RuntimeError(repr(caught))
        finally:
            self._end(save, began, error, restored)

    def _end(self, save: _Save, began: float, error: Exception | None, restored: bool) -> None:
        save.state, save.carried = {}, ()
        if not isinstance(error, SaveGivenUpError):
            outcome = Outcome(
                step=save.step,
                path=self._run.step_path(save.step),
                is_best=save.is_best,
                seconds=time.perf_counter() - began,
                error=error,
                restored=restored,
            )
            with self._outcomes_lock:
                self._outcomes.append(outcome)
        save.done.set()


def _step_back() -> None:
    """Let other threads have the cores first, where the system knows priorities of threads.

    Training on a CPU computes with all cores and waits for the slowest: a writer with equal rights
    holds it up by twice its own work.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


_WRITING: weakref.WeakSet[_Save] = weakref.WeakSet()


@atexit.register
def _end_writing() -> None:
    """Let no thread write while the interpreter falls apart: that would abort the process.

    What is being written is finished, unless it was given up.
    """
    for save in _WRITING.copy():
        if save.given_up.is_set():
            save.done.wait(_EXIT_S)
        else:
            save.wait()


def _forget_locals(error: BaseException | None) -> None:
    """Let an error keep the lines where it arose but not what was there: a whole state."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
