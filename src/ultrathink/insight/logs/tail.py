"""A file that grows: its new lines, and whether it was cut or replaced meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 2**20
_REMEMBERED_BYTES = 256  # before the place that was read to: what tells another file of that size


@dataclass(frozen=True)
class NewLines:
    """Whole lines that were appended; from the beginning where ``is_anew``."""

    lines: list[str]
    is_anew: bool = False


class Tail:
    """Reads a text file line by line, again and again, from where it stopped.

    A line without its end is left for the next time. That a file is another one is seen by its
    inode, or by other bytes, or none, before the place that was read to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._before = b""  # the last bytes that were read
        self._inode: int | None = None

    def read(self) -> NewLines:
        """The lines since the last call. Raises OSError where the file is gone."""
        with self.path.open("rb") as file:
            is_anew = self._is_another(file.fileno())
            if is_anew:
                self._position, self._before = 0, b""
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        self._before = (self._before + whole)[-_REMEMBERED_BYTES:]
        return NewLines(decoded(whole).split("\n")[:-1], is_anew)

    def _is_another(self, descriptor: int) -> bool:
        status = os.fstat(descriptor)
        known, self._inode = self._inode, status.st_ino
        if known is None or self._position == 0:
            return False
        if known != status.st_ino:
            return True
        place = self._position - len(self._before)
        return os.pread(descriptor, len(self._before), place) != self._before


def all_lines(path: Path) -> Iterator[tuple[str, bool]]:
    """Every line of a file, and whether it has its end."""
    with path.open("rb") as file:
        for line in file:
            yield decoded(line).rstrip("\n"), line.endswith(b"\n")


def decoded(data: bytes) -> str:
    """Text, whatever else is in it: bytes that are no UTF-8 are replaced."""
    return data.decode("utf-8", "replace").removeprefix("\ufeff")


def beginning(path: Path, size: int = _BLOCK_BYTES) -> bytes:
    """The first ``size`` bytes of a file."""
    with path.open("rb") as file:
        return file.read(size)
