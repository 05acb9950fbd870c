"""Logs of lines: a reader takes one line after the other, and the file may grow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ultrathink.insight.logs.log import Log, LogSignals, News
from ultrathink.insight.logs.names import Meaning
from ultrathink.insight.logs.rows import Rows
from ultrathink.insight.logs.tail import Tail, all_lines

SAMPLE_LINES = 200
# The row on a line: an empty one where it says nothing, None where it cannot be read.
Parse = Callable[[str], Mapping[str, Any] | None]


class LineReader(ABC):
    """Takes the lines of a log, in order."""

    def __init__(self, rows: Rows) -> None:
        self.num_unread = 0  # lines that should have told something, and could not be read
        self.rows = rows

    @property
    def total_steps(self) -> int | None:
        """How many steps the run is to take, once the log has told."""
        return self.rows.total_steps

    @abstractmethod
    def feed(self, line: str) -> list[LogSignals]:
        """The signals that are complete with this line."""

    def finish(self) -> list[LogSignals]:
        """What was waiting for another line: nothing where every line is whole."""
        return []


class RowReader(LineReader):
    """Reads lines that hold a row each."""

    def __init__(self, rows: Rows, parse: Parse) -> None:
        super().__init__(rows)
        self._parse = parse

    def feed(self, line: str) -> list[LogSignals]:
        """The signals of the row on a line."""
        row = self._parse(line)
        self.num_unread += row is None
        signals = self.rows.take(row) if row else None
        return [signals] if signals is not None else []


class LineLog(Log):
    """A log of lines; ``make_reader`` makes a reader that knows nothing yet."""

    def __init__(self, path: Path, format: str, make_reader: Callable[[], LineReader]) -> None:
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
        self.notes = ["The last line is torn and was left out."] if is_torn else []
        if damaged := reader.num_unread - is_torn:
            lines = "line is" if damaged == 1 else "lines are"
            self.notes.append(f"{damaged:,} {lines} damaged and left out.")

    def poll(self) -> News:
        """The signals of the lines that were appended since the last call."""
        new = self._tail.read()
        if new.is_anew:
            self._reader = self._make_reader()
        signals = [found for line in new.lines for found in self._reader.feed(line)]
        if not new.lines:  # nothing follows, so the last record is whole
            signals += self._reader.finish()
        self.total_steps = self._reader.total_steps
        return News(signals, new.is_anew)


def log_of_rows(
    path: Path,
    format: str,
    parse: Parse,
    lines: Iterable[str],
    columns: Mapping[str, str],
    extra: Mapping[str, Meaning] | None = None,
) -> LineLog:
    """The log whose lines hold a row each; LogError where the first ones do not say what is what.

    ``columns`` are the user's own names, ``extra`` those of the format.
    """
    known = Rows(columns, extra)
    known.require((row for line in lines if (row := parse(line))), path)
    if known.is_counted:
        format += ", rows counted as steps"

    def make_reader() -> LineReader:
        return RowReader(Rows(columns, extra, has_sources=known.has_sources), parse)

    return LineLog(path, format, make_reader)
