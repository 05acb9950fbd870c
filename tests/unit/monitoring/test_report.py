"""Lines and tables for a person, on a terminal and in a pipe."""

import io
import re

import pytest

from tests.unit.monitoring.screens import Terminal
from ultrathink.monitoring.report import Cell, Column, Report


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")


COLUMNS = [Column("name", folds=True), Column("loss", right=True), Column("", style="cyan")]
ROWS: list[list[str | Cell]] = [["a", "1.5", Cell("ok", "green")], ["名前", "12.25", ""]]


def test_a_pipe_gets_aligned_text_and_nothing_else() -> None:
    stream = io.StringIO()
    report = Report(stream)
    report.line(Cell("title", "bold"), " and more ")
    report.table(COLUMNS, ROWS, indent=2)
    assert stream.getvalue() == (
        "title and more\n  name   loss\n  a       1.5  ok\n  名前  12.25\n"
    )
    assert not report.has_colors


def test_a_terminal_gets_colours_and_the_same_columns() -> None:
    stream = Terminal()
    report = Report(stream)
    report.table(COLUMNS, ROWS, indent=2)
    text = stream.getvalue()
    assert "\x1b[32mok" in text
    assert report.has_colors
    assert report.width == 40


def test_no_color_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    report = Report(stream)
    report.table(COLUMNS, ROWS)
    assert not report.has_colors
    assert not re.search(r"\x1b\[[0-9;]*3\d", stream.getvalue())


def test_a_narrow_terminal_folds_what_may_fold_and_keeps_figures() -> None:
    stream = Terminal()
    Report(stream).table(
        [Column("name", folds=True), Column("n", right=True)], [["x" * 60, "12.5"]]
    )
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "12.5" in lines[1]
    assert sum(line.count("x") for line in lines) == 60


def test_nothing_in_a_cell_can_steer_the_terminal() -> None:
    for stream in (io.StringIO(), Terminal()):
        report = Report(stream)
        report.table([Column("name")], [["evil\x1b[2Jname\nsecond"]])
        report.line("evil\x1b[2J\nsecond")
        assert "\x1b[2J" not in stream.getvalue()
        assert len(stream.getvalue().splitlines()) == 3


@pytest.mark.parametrize(("encoding", "can"), [("utf-8", True), ("UTF8", True), ("ascii", False)])
def test_what_an_encoding_can_draw(encoding: str, can: bool) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert Report(stream).can_draw is can


def test_a_reader_that_leaves_raises_an_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Report(Gone()).line("text")
