"""A file that grows: its new lines, and whether it was cut or replaced meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_COLOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_REMEMBERED_BYTES = 256  # before the position of the reader: by these a replaced file is known


class Tail:
    """Reads a text file line by line, each time from where it stopped.

    A line without its end is left for the next time. A progress bar that is redrawn has its end in
    a carriage return, which stays in the text. A replaced file is known by its inode, or by other
    bytes, or none, before the position of the reader.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._before = b""  # the last bytes that were read
        self._inode: int | None = None

    def read(self) -> tuple[list[str], bool]:
        """The lines since the last call; all lines, and True, where the file was cut or replaced.

        Raises OSError where the file is gone.
        """
        with self.path.open("rb") as file:
            is_replaced = self._is_replaced(file.fileno())
            if is_replaced:
                self._position, self._before = 0, b""
            file.seek(self._position)
            data = file.read()
        whole = data[: max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1]
        self._position += len(whole)
        self._before = (self._before + whole)[-_REMEMBERED_BYTES:]
        lines = decoded(whole).replace("\r\n", "\n").split("\n")
        return lines if lines[-1] else lines[:-1], is_replaced

    def _is_replaced(self, descriptor: int) -> bool:
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
            yield decoded(line).rstrip("\r\n"), line.endswith(b"\n")


def decoded(data: bytes) -> str:
    """Text of any bytes: those that are no UTF-8 are replaced, colors of a terminal left out."""
    return _COLOR.sub("", data.decode("utf-8", "replace").removeprefix("\ufeff"))
