"""Tables: CSV, TSV, with semicolons or columns of spaces, with one line of titles."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrathink.insight.logs.line_log import SAMPLE_LINES, LineLog, log_of_rows
from ultrathink.insight.logs.log import NotYetError
from ultrathink.insight.logs.names import Meaning, is_telling, meaning_of
from ultrathink.insight.logs.numbers import is_absent, parse_number

_MAX_TITLE = 200  # characters; prose is longer
_NAMES = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", " ": "a table with spaces"}
# A table may hold what no other log has: milliseconds since the beginning.
_EXTRA = {"time/iteration": Meaning("step_time")}


@dataclass(frozen=True)
class Shape:
    """How a table is written: what parts its cells, and the titles of its columns."""

    delimiter: str
    titles: tuple[str, ...]

    @property
    def is_known(self) -> bool:
        """Whether one of the titles says what it is."""
        meanings = [meaning_of(title) for title in self.titles]
        return any(is_telling(meaning.signal) for meaning in meanings if meaning is not None)

    def cells(self, line: str) -> list[str]:
        """The cells of a line."""
        if self.delimiter == " ":
            return line.split()
        try:
            return next(csv.reader([line], delimiter=self.delimiter, skipinitialspace=True), [])
        except csv.Error:  # a cell of more than 128 kB, for one
            return []

    def row(self, line: str) -> dict[str, str] | None:
        """The row on a line; titles that come again and comments have none."""
        if _is_blank(line):
            return {}
        cells = self.cells(line.rstrip("\r"))
        if cells and self.titles[-1] == cells[-1].strip() and not line[:1].isdigit():
            return {}
        # A last column that is empty throughout has, as a rule, no title.
        fits = len(cells) >= len(self.titles) and not any(
            cell.strip() for cell in cells[len(self.titles) :]
        )
        is_row = fits and any(parse_number(cell) is not None for cell in cells)
        return dict(zip(self.titles, cells, strict=False)) if is_row else None


def table_shape(lines: Sequence[str]) -> Shape | None:
    """The shape of the table that these lines begin; None where they are none."""
    kept = [line.rstrip("\r") for line in lines if not _is_blank(line)][:SAMPLE_LINES]
    if not kept:
        return None
    for delimiter in _NAMES:
        shape = Shape(delimiter, ())
        cells = shape.cells(kept[0].lstrip("# "))
        # A column of row numbers has no title, as a rule.
        shape = Shape(delimiter, tuple(c.strip() or f"column {n}" for n, c in enumerate(cells, 1)))
        if _are_titles(shape.titles) and _are_rows(shape, kept[1:]):
            return shape
    return None


def open_table(
    path: Path, shape: Shape, lines: Sequence[str], columns: Mapping[str, str]
) -> LineLog:
    """The log in a table; LogError where its columns cannot be guessed."""
    sample = [line for line in lines if not _is_blank(line)][1 : SAMPLE_LINES + 1]
    if not sample:
        raise NotYetError(f"{path} has titles of columns and no rows yet.")
    return log_of_rows(path, _NAMES[shape.delimiter], shape.row, sample, columns, _EXTRA)


def _is_blank(line: str) -> bool:
    return not line.strip() or (line.startswith("#") and "," not in line)


def _are_titles(titles: Sequence[str]) -> bool:
    return (
        len(titles) > 1
        and len(set(titles)) == len(titles)
        and all(len(title) <= _MAX_TITLE for title in titles)
        and all(parse_number(title) is None for title in titles)
    )


def _are_rows(shape: Shape, lines: Sequence[str]) -> bool:
    """Whether most lines have a cell for each title, and numbers among them."""
    if not lines:
        return shape.is_known
    good = 0
    for line in lines:
        cells = shape.cells(line)
        fits = len(cells) >= len(shape.titles)
        numbers = sum(parse_number(cell) is not None for cell in cells)
        texts = sum(not is_absent(cell) for cell in cells) - numbers
        good += fits and numbers > 0 and (numbers >= texts or shape.delimiter != " ")
    return 2 * good > len(lines) or (good > 0 and shape.is_known)
