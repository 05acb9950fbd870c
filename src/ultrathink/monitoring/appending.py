"""Appending to files that may be deleted, on disks that may be full, during a run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from ultrathink.monitoring.records import Note

MAX_WAITING = 10_000


class ResilientAppender:
    """Appends entries to a file in their order; entries that cannot be written wait in memory.

    The file is opened for every entry, so nothing is written to a file that was deleted, moved or
    replaced: its folder and file are created again. An entry that does not fit on the disk is
    removed as a whole. ``append`` and ``flush`` raise OSError while entries wait; each call tries
    again, oldest first.

    ``place`` returns the path whenever a new file starts; every file starts with ``header``.
    ``prepare`` is called once, before the first entry. ``end`` closes every entry, so that nothing
    is appended to one that a crash left incomplete; b"" for entries that store their length.
    """

    def __init__(
        self,
        place: Callable[[], Path],
        *,
        header: bytes = b"",
        end: bytes = b"\n",
        prepare: Callable[[], object] | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._place = place
        self._path = place()
        self._header = header
        self._end = end
        self._prepare = prepare
        self._max_waiting = max_waiting
        self._waiting: deque[bytes] = deque()
        self._is_flushing = False
        self._size: int | None = None  # of the file after our last entry; None where unknown
        self._num_written = 0  # entries in the present file
        self._num_delayed = 0
        self._num_dropped = 0
        self._notes: list[Note] = []

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    def append(self, entry: bytes) -> None:
        """Write ``entry`` after those that wait; OSError where it has to wait too."""
        self._waiting.append(entry)
        if len(self._waiting) > self._max_waiting:
            self._waiting.popleft()
            self._num_dropped += 1
        self.flush()

    def flush(self) -> None:
        """Write the waiting entries; OSError where that is still impossible."""
        if self._is_flushing:  # called by a signal handler meanwhile: the outer call continues
            return
        self._is_flushing = True
        try:
            if self._prepare is not None:
                self._prepare()
                self._prepare = None
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except BaseException as error:
            self._num_delayed = len(self._waiting)
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            raise
        finally:
            self._is_flushing = False
        self._note_recovery()

    def close(self) -> None:
        """Try once more to write the waiting entries; OSError where some are lost."""
        try:
            self.flush()
        finally:
            if lost := len(self._waiting) + self._num_dropped:
                self._note(f"{self._path} lacks {_entries(lost)} that could not be written")
            self._waiting.clear()
            self._num_delayed = self._num_dropped = 0

    def take_notes(self) -> list[Note]:
        notes, self._notes = self._notes, []
        return notes

    def _write(self, entry: bytes) -> None:
        self._notice_loss()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                entry = self._header + entry
            elif size != self._size and self._is_torn(file):
                entry = self._end + entry
            try:
                _write_whole(file, entry)
            except BaseException:
                self._remove_torn(file, size)
                raise
        self._size = size + len(entry)
        self._num_written += 1

    def _notice_loss(self) -> None:
        if self._size is None:
            return
        try:
            if self._path.stat().st_size >= self._size:
                return
            what = "was cut or replaced"
        except (FileNotFoundError, NotADirectoryError):
            what = "was deleted or moved"
        text = f"{self._path} {what} while the run wrote to it"
        lost = _entries(self._num_written)
        self._start_file()
        self._note(f"{text}, with up to {lost}; later entries are written to {self._path}")

    def _start_file(self) -> None:
        self._path = self._place()
        self._size = None
        self._num_written = 0

    def _is_torn(self, file: FileIO) -> bool:
        if not self._end:
            return False
        file.seek(-len(self._end), os.SEEK_END)
        return file.read(len(self._end)) != self._end

    def _remove_torn(self, file: FileIO, size: int) -> None:
        try:
            file.truncate(size)
        except OSError:  # the torn entry stays: later entries need another file
            self._start_file()

    def _note_recovery(self) -> None:
        if self._num_delayed:
            text = f"{self._path} now has the {_entries(self._num_delayed)} that had to wait"
            if self._num_dropped:
                text += f"; {self._num_dropped:,} older ones are lost"
            self._notes.append((text, "warning" if self._num_dropped else "info"))
            self._num_delayed = self._num_dropped = 0

    def _note(self, text: str) -> None:
        self._notes.append((text, "warning"))


def _write_whole(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count:,} entries"
