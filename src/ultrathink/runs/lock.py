"""One process at a time in a run folder.

The lock is the operating system's (``flock``, on Windows ``msvcrt``): it is free again the moment
its holder ends, however that ends. Who holds it stands beside it in ``.owner.json``.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout

from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import write_atomic
from ultrathink.runs.folder import RunFolder

OWNER_FILE = ".owner.json"
# Who asks whether a run is held, holds it for a moment; others wait that long before they say so.
_PROBE_S = 0.25
_POLL_S = 0.01


@dataclass(frozen=True)
class Owner:
    """A process that holds a run, since ``started`` (unix time); its ``pid`` is 0 if unknown."""

    pid: int = 0
    host: str = ""
    started: float = 0.0
    command: str = ""

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on host {self.host}, since {since}"


class RunLock:
    """Keeps other processes, and other trainers of this one, out of a run folder.

    Made by ``acquire``. It ends with ``release()``, with its ``with`` block, when nothing refers to
    it any more, or with the process.
    """

    def __init__(self, run: RunFolder, lock: BaseFileLock) -> None:
        self.run = run
        self._hold(lock)

    @classmethod
    def acquire(cls, run: RunFolder, timeout_s: float = 2.0) -> RunLock:
        """Hold ``run``; CheckpointError names who else does, or why its folder takes no lock."""
        return cls(run, _take_or_explain(run, timeout_s))

    def renew(self) -> None:
        """Hold the run again where its folder vanished, the lock with it, and was made anew.

        Raises CheckpointError where another process was quicker.
        """
        if self._release.alive and _identity(self.run) != self._file:
            lock = _take_or_explain(self.run, _PROBE_S)
            self._release()
            self._hold(lock)

    def release(self) -> None:
        """Give the run free; a second time does nothing."""
        self._release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _hold(self, lock: BaseFileLock) -> None:
        self._file = _identity(self.run)
        path = self.run.path.absolute() / OWNER_FILE
        self._release = weakref.finalize(self, _release, lock, path, os.getpid())
        _write_owner(path)


def holder(run: RunFolder) -> Owner | None:
    """Who holds ``run`` now; None where nobody does, or where the folder cannot be asked."""
    if not run.lock_file.exists():
        return None
    try:
        lock = _take(run, _PROBE_S)
    except OSError:
        return None
    if lock is None:
        return _read_owner(run.path / OWNER_FILE)
    lock.release()
    return None


def _take(run: RunFolder, timeout_s: float) -> BaseFileLock | None:
    """The lock of ``run``, or None where it is held; OSError where there can be none."""
    if not run.path.is_dir():  # which filelock would make
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run.path))
    # Not one a thread: whoever ends the run releases it.
    lock = FileLock(run.lock_file.absolute(), thread_local=False)
    try:
        lock.acquire(timeout=timeout_s, poll_interval=_POLL_S)
    except Timeout:
        return None
    return lock


def _take_or_explain(run: RunFolder, timeout_s: float) -> BaseFileLock:
    try:
        lock = _take(run, timeout_s)
    except OSError as error:
        raise CheckpointError(
            f"run {run.path} cannot be locked, so it cannot be trained: {error.strerror or error} "
            f"({run.lock_file}). Its folder must be there and take files."
        ) from None
    if lock is None:
        owner = _read_owner(run.path / OWNER_FILE)
        raise CheckpointError(
            f"run {run.path} is in use by {owner}; {_advice(owner)}. "
            f"Two processes in one run folder would spoil it."
        )
    return lock


def _advice(owner: Owner) -> str:
    if owner.host != socket.gethostname():
        return "wait for it or stop it there"
    if owner.pid == os.getpid():
        return "which is this one: let its other trainer end first"
    return f"wait for it or stop it (kill {owner.pid})"


def _release(lock: BaseFileLock, owner_file: Path, pid: int) -> None:
    if os.getpid() != pid:  # a forked child ends; its parent still holds the run
        return
    with suppress(OSError):
        if _read_owner(owner_file).pid == pid:
            owner_file.unlink()
    lock.release()


def _identity(run: RunFolder) -> tuple[int, int] | None:
    """Which file the lock file is: one that was made anew is another."""
    try:
        found = run.lock_file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _write_owner(path: Path) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    owner = Owner(os.getpid(), socket.gethostname(), time.time(), command)
    with suppress(OSError):  # what a killed process left must not be taken for this one
        path.unlink(missing_ok=True)
    with suppress(OSError):  # a full disk: the lock holds all the same
        write_atomic(path, json.dumps(asdict(owner)))


def _read_owner(path: Path) -> Owner:
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Owner()
