"""Logs in files: lines that are appended, or a document that is written again as a whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ultrathink.insight.logs.documents import read_document, rows_of
from ultrathink.insight.logs.formats import first_rows
from ultrathink.insight.logs.log import Log, LogError, LogSignals, News, NotYetError, Parse, Row
from ultrathink.insight.logs.names import Meaning
from ultrathink.insight.logs.reader import Columns, Reader
from ultrathink.monitoring.jsonl import METRICS_FILE, parse_object
from ultrathink.monitoring.records import MetricRecord

_COLOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_REMEMBERED_BYTES = 256  # before the position of the reader: by these a replaced file is known
_OUR_FIRST_ROW = {"step": 1, "split": "train", "loss": 0.0}


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


class LineLog(Log):
    """A log of lines; ``make_reader`` makes a reader for the beginning of the file."""

    def __init__(self, path: Path, format: str, make_reader: Callable[[], Reader]) -> None:
        super().__init__(path, format)
        self._make_reader = make_reader
        self._tail = Tail(path)
        self._reader = make_reader()

    def signals(self) -> Iterator[LogSignals]:
        """All signals from the beginning; a torn last line is left out, with a note."""
        reader = self._make_reader()
        is_torn = False
        for line, has_end in all_lines(self.path):
            before = reader.num_unread
            signals = reader.feed(line)
            is_torn = not has_end and reader.num_unread > before
            self.total_steps = reader.total_steps
            yield from signals
        yield from reader.finish()
        self.notes = reader.notes(is_torn=is_torn)

    def poll(self) -> News:
        """The signals of the lines that were appended since the last call."""
        lines, is_replaced = self._tail.read()
        if is_replaced:
            self._reader = self._make_reader()
        signals = [found for line in lines for found in self._reader.feed(line)]
        if not lines:  # nothing follows, so the last record is whole
            signals += self._reader.finish()
        self.total_steps = self._reader.total_steps
        return News(signals, is_replaced)


class DocumentLog(Log):
    """A log in one JSON document, which is read whole whenever it changed."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        super().__init__(path, "")
        self._columns = columns
        self._known: list[LogSignals] = []  # what ``poll`` has returned
        self._state: tuple[int, int, int] | None = None
        self._load()

    def signals(self) -> Iterator[LogSignals]:
        """All signals of the document as it is now."""
        yield from self._load()

    def poll(self) -> News:
        """What the document has beyond what it had at the last call."""
        status = self.path.stat()
        state = status.st_ino, status.st_size, status.st_mtime_ns
        if state == self._state:
            return News()
        try:
            found = self._load()
        except LogError:  # it is being written
            return News()
        self._state = state
        known, self._known = self._known, found
        # A NaN is not equal to itself, but its repr is.
        if repr(found[: len(known)]) == repr(known):
            return News(found[len(known) :])
        return News(found, is_replaced=True)

    def _load(self) -> list[LogSignals]:
        document, is_whole = read_document(self.path)
        self.format, rows, total_steps = rows_of(document, self.path)
        columns = Columns(rows, self._columns)
        columns.require(self.path)
        reader = Reader(columns)
        found = [signals for row in rows for signals in reader.take(row)]
        cut = [] if is_whole else ["The document is cut off; what is whole of it was read."]
        self.notes = [*cut, *reader.notes()]
        self.total_steps = total_steps or reader.total_steps
        return found


def our_log(path: Path) -> LineLog:
    """A run's ``metrics.jsonl``, where null is a value that was not finite."""
    columns = Columns([_OUR_FIRST_ROW])
    return LineLog(path, METRICS_FILE, lambda: Reader(columns, _our_row, null_is_nan=True))


def open_lines(
    path: Path,
    format: str,
    make_parse: Callable[[], Parse],
    given: Mapping[str, str],
    names: Mapping[str, Meaning] | None = None,
    *,
    joins: bool = False,
) -> LineLog:
    """The log in lines that ``make_parse()`` reads; LogError where its columns are unknown."""
    rows = list(first_rows((line for line, _ in all_lines(path)), make_parse()))
    if not rows:
        raise NotYetError(f"{path} has titles of columns and no rows yet.")
    columns = Columns(rows, given, names)
    columns.require(path, is_known=joins)
    name = format if columns.step is not None else f"{format}, rows counted as steps"
    return LineLog(path, name, lambda: Reader(columns, make_parse(), joins=joins))


def _our_row(line: str) -> Row | LogSignals | None:
    """A line of ``metrics.jsonl``; what evaluators found under the names of live signals."""
    row = parse_object(line) if line.strip() else {}
    record = MetricRecord.from_json(row) if row and row.get("split") == "eval" else None
    if row is None or record is None:
        return row
    figures = {name: value for name, value in record.values.items() if name != "tokens"}
    return LogSignals(record.step, {f"eval/{name}": one for name, one in figures.items()})
