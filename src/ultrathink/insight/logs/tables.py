"""Tables: CSV, TSV, with semicolons or columns of spaces, below a line of titles."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from ultrathink.insight.logs.formats import prefix_of, rank_of
from ultrathink.insight.logs.log import SAMPLE_ROWS, LogError, Row
from ultrathink.insight.logs.names import is_absent, is_telling, meaning_of, quantity

NAMES = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", " ": "a table with spaces"}
_MAX_TITLE = 200  # characters; prose is longer


class Table:
    """Reads the lines of a table as rows; a line of other titles counts for the rows below it."""

    def __init__(self, delimiter: str, title_line: str) -> None:
        self.delimiter = delimiter
        self._has_prefix = bool(prefix_of(title_line))  # of a logger, on each line
        self.titles = _titles(self.cells(title_line.lstrip("# ")))

    @property
    def is_known(self) -> bool:
        """Whether one of the titles says what it is."""
        return _is_known(self.titles)

    def __call__(self, line: str) -> Row | None:
        """The row on a line; titles and comments have none, and of others None is the row."""
        if _is_blank(line):
            return {}
        cells = self.cells(line)
        numbers = [cell for cell in cells if quantity(cell)[0] is not None]
        titles = _titles(cells)
        if not numbers and (titles == self.titles or (_are_titles(titles) and _is_known(titles))):
            self.titles = titles
            return {}
        # A last column that is empty throughout has, as a rule, no title.
        beyond = "".join(cells[len(self.titles) :]).strip()
        is_row = numbers and len(cells) >= len(self.titles) and not beyond
        return dict(zip(self.titles, cells, strict=False)) if is_row else None

    def cells(self, line: str) -> list[str]:
        """The cells of a line, without the prefix of a logger."""
        prefix = prefix_of(line)
        is_prefixed = self._has_prefix or rank_of(prefix) is not None
        text = line[len(prefix) :] if is_prefixed else line
        if self.delimiter == " ":
            return text.split()
        try:
            cells = next(csv.reader([text], delimiter=self.delimiter, skipinitialspace=True), [])
        except csv.Error:  # a cell of more than 128 kB, for one
            return []
        if self.delimiter == ";":  # where semicolons part cells, commas part decimals
            return [cell.replace(",", ".") if cell.count(",") == 1 else cell for cell in cells]
        return cells

    def fits(self, lines: Sequence[str]) -> bool:
        """Whether most lines have a cell for each title, and numbers among them."""
        good = 0
        for line in lines:
            cells = self.cells(line)
            numbers = sum(quantity(cell)[0] is not None for cell in cells)
            texts = sum(not is_absent(cell) for cell in cells) - numbers
            is_row = len(cells) >= len(self.titles) and numbers > 0
            good += is_row and (numbers >= texts or self.delimiter != " ")
        return 2 * good > len(lines) or (self.is_known and (good > 0 or not lines))


def find_table(lines: Sequence[str]) -> Table | None:
    """The table that these lines begin, before its first row; None where they are none.

    LogError where two columns have one title.
    """
    kept = [line for line in lines if not _is_blank(line)][: SAMPLE_ROWS // 2]
    for delimiter in NAMES if kept else ():
        table = Table(delimiter, kept[0])
        if not _are_titles(table.titles) or not table.fits(kept[1:]):
            continue
        twice = sorted({title for title in table.titles if table.titles.count(title) > 1})
        if not twice:
            return table
        if _is_known(twice):
            raise LogError(f"two columns are called {twice[0]!r}; give each another title.")
    return None


def _is_blank(line: str) -> bool:
    return not line.strip() or (line.startswith("#") and "," not in line)


def _titles(cells: Sequence[str]) -> tuple[str, ...]:
    # A column of row numbers has no title, as a rule.
    return tuple(cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1))


def _are_titles(titles: Sequence[str]) -> bool:
    return len(titles) > 1 and all(
        len(title) <= _MAX_TITLE and quantity(title)[0] is None for title in titles
    )


def _is_known(titles: Sequence[str]) -> bool:
    meanings = [meaning_of(title.rpartition(" - ")[2]) for title in titles]
    return any(is_telling(meaning.signal) for meaning in meanings if meaning is not None)
