"""Results for a person on standard output: styled on a terminal, plain aligned text elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ultrathink.monitoring.terminal import SafeStream, clean_text, is_interactive, make_console

_GAP = 2
_ENDLESS = 100_000  # columns where the output is not a terminal: nothing folds


@dataclass(frozen=True)
class Column:
    """A column of a table; ``folds`` lets a narrow terminal break its cells into lines."""

    title: str
    right: bool = False
    folds: bool = False
    style: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell with its style."""

    text: str
    style: str = ""


class Report:
    """Writes lines and tables to ``stream`` (standard output).

    Errors of writing are ignored on a terminal and raised in a pipe, so that the program ends when
    its reader has gone.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream: IO[str] = stream if stream is not None else sys.stdout
        safe = SafeStream(self._stream)
        self._encoding = safe.encoding
        self._console = make_console(safe) if is_interactive(safe) else None

    @property
    def has_colors(self) -> bool:
        """Whether colours are shown: not in a pipe, and not under NO_COLOR."""
        console = self._console
        return console is not None and console.color_system is not None and not console.no_color

    @property
    def can_draw(self) -> bool:
        """Whether the stream's encoding has bars, dots and lines."""
        return self._encoding.lower().replace("-", "").startswith("utf")

    @property
    def width(self) -> int:
        """Columns of the terminal; 100 for a file."""
        return self._console.width if self._console is not None else 100

    def line(self, *parts: str | Cell) -> None:
        """Print ``parts`` joined to one line, which a terminal wraps between words."""
        cells = [_cell(part) for part in parts]
        if self._console is None:
            self._stream.write("".join(cell.text for cell in cells).rstrip() + "\n")
        else:
            self._console.print(Text.assemble(*((cell.text, cell.style) for cell in cells)))

    def table(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str | Cell]],
        *,
        indent: int = 0,
        heading: bool = True,
    ) -> None:
        """Print rows of cells, each column as wide as its widest cell."""
        table = Table(
            box=None,
            padding=(0, _GAP, 0, 0),
            pad_edge=False,
            header_style="bold",
            show_header=heading,
        )
        if indent:
            table.add_column("", width=max(0, indent - _GAP))
        for column in columns:
            table.add_column(
                Text(column.title, style=column.style),
                justify="right" if column.right else "left",
                no_wrap=not column.folds,
                overflow="fold" if column.folds else "ellipsis",
            )
        for row in rows:
            texts = [Text(cell.text, style=cell.style) for cell in map(_cell, row)]
            table.add_row(*([Text("")] if indent else []), *texts)
        if self._console is not None:
            self._console.print(table)
            return
        plain = Console(file=io.StringIO(), width=_ENDLESS, color_system=None)
        with plain.capture() as captured:
            plain.print(table)
        for line in captured.get().splitlines():
            self.line(line)


def _cell(value: str | Cell) -> Cell:
    cell = value if isinstance(value, Cell) else Cell(value)
    return Cell(clean_text(cell.text).replace("\n", " "), cell.style)
