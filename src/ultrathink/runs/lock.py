"""Locks a run folder for one process at a time.

The lock is the operating system's (``flock``, on Windows ``msvcrt``): it is released as soon as
its holder ends, in any way. ``.owner.json`` beside it names the holder.
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

from filelock import BaseFileLock, FileLock, Timeout

from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import write_atomic
from ultrathink.runs.folder import RunFolder

OWNER_FILE = ".owner.json"
# Asking whether a run is locked takes the lock for a moment; others wait this long.
_PROBE_S = 0.25
_POLL_S = 0.01


@dataclass(frozen=True)
class Owner:
    """A process that holds a run since ``started`` (unix time); ``pid`` is 0 if unknown."""

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

    Created by ``acquire``. It ends with ``release()``, with its ``with`` block, when nothing refers
    to it any more, or with the process.
    """

    def __init__(self, run: RunFolder, lock: BaseFileLock) -> None:
        self.run = run
        self._hold(lock)

    @classmethod
    def acquire(cls, run: RunFolder, timeout_s: float = 2.0) -> RunLock:
        """Lock ``run``; CheckpointError names the holder, or why the folder cannot be locked."""
        return cls(run, _take_or_explain(run, timeout_s))

    def renew(self) -> None:
        """Lock the run again after its folder, with the lock, vanished and was created again.

        Raises CheckpointError if another process was faster.
        """
        if self._release.alive and _identity(self.run) != self._file:
            lock = _take_or_explain(self.run, _PROBE_S)
            self._release()
            self._hold(lock)

    def release(self) -> None:
        """Release the run; a second call does nothing."""
        self._release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _hold(self, lock: BaseFileLock) -> None:
        self._file = _identity(self.run)
        path = self.run.path.absolute() / OWNER_FILE
        self._release = weakref.finalize(self, _release, lock, path, os.getpid())
        _write_owner(path)


def holder(run: RunFolder) -> Owner | None:
    """The holder of ``run``; None if there is none or the folder cannot be locked."""
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
    """The lock of ``run``, or None if it is held; OSError if the folder cannot be locked."""
    if not run.path.is_dir():  # filelock would create it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run.path))
    # Not per thread: the thread that ends the run releases it.
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
            f"({run.lock_file}). Its folder must exist and be writable."
        ) from None
    if lock is None:
        owner = _read_owner(run.path / OWNER_FILE)
        raise CheckpointError(
            f"run {run.path} is in use by {owner}; {_advice(owner)}. "
            f"Two processes in one run folder would corrupt it."
        )
    return lock


def _advice(owner: Owner) -> str:
    if owner.host != socket.gethostname():
        return "wait for it or stop it there"
    if owner.pid == os.getpid():
        return "which is this one: let its other trainer end first"
    return f"wait for it or stop it (kill {owner.pid})"


def _release(lock: BaseFileLock, owner_file: Path, pid: int) -> None:
    if os.getpid() != pid:  # the end of a forked child; its parent still holds the run
        return
    with suppress(OSError):
        if _read_owner(owner_file).pid == pid:
            owner_file.unlink()
    lock.release()


def _identity(run: RunFolder) -> tuple[int, int] | None:
    """The identity of the lock file, which changes if it is created again."""
    try:
        found = run.lock_file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _write_owner(path: Path) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    owner = Owner(os.getpid(), socket.gethostname(), time.time(), command)
    with suppress(OSError):  # the file of a killed process must not be mistaken for this one's
        path.unlink(missing_ok=True)
    with suppress(OSError):  # on a full disk the lock still works
        write_atomic(path, json.dumps(asdict(owner)))


def _read_owner(path: Path) -> Owner:
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Owner()
