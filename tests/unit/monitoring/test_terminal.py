"""Figures in short, text made harmless, streams that cannot end a run."""

import io
import math
import os

import pytest

from tests.unit.monitoring.screens import Terminal
from ultrathink.monitoring.terminal import SafeStream, clean_text, is_interactive
from ultrathink.monitoring.wording import short_number, short_time


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (950, "950"), (999.7, "1k"), (18_211, "18.2k"), (999_900, "1M"),
     (1_310_000, "1.31M"), (2.5e9, "2.5B"), (1.2e12, "1.2T"), (math.nan, "nan"), (math.inf, "inf")],
)  # fmt: skip
def test_counts_are_short(value: float, text: str) -> None:
    assert short_number(value) == text
    assert len(short_number(value)) <= 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (250, "4m 10s"), (3599.7, "1h 00m"),
     (11_100, "3h 05m"), (86_400 * 2 + 3600 * 4, "2d 4h")],
)  # fmt: skip
def test_times_have_two_units(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


def test_control_characters_never_reach_the_terminal() -> None:
    cleaned = clean_text("a\x1b[31mred\x07\r\nb\tc\x9b2J\x00")
    assert cleaned == "a\ufffd[31mred\ufffd\nb   c\ufffd2J\ufffd"


class Broken(io.StringIO):
    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise BrokenPipeError


def test_a_broken_stream_falls_silent_after_the_first_failure() -> None:
    broken = Broken()
    stream = SafeStream(broken)
    assert stream.write("a") == 1
    assert stream.write("bc") == 2
    stream.flush()
    assert broken.writes == 1
    assert stream.failure == "BrokenPipeError: "
    assert not stream.isatty()


def test_a_closed_or_absent_stream_is_silent() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (SafeStream(closed), SafeStream(None)):
        stream.write("a")
        stream.flush()
        assert not stream.isatty()


def test_what_the_encoding_lacks_is_replaced() -> None:
    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    SafeStream(text).write("naïve ━")
    assert raw.getvalue() == b"na?ve ?"


def test_a_slow_reader_loses_text_and_no_more() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with os.fdopen(reading, "rb") as ours, os.fdopen(writing, "w", buffering=1) as theirs:
        stream = SafeStream(theirs)
        for _ in range(3000):
            stream.write("y" * 99 + "\n")  # far more than a pipe holds
        assert stream.failure is None
        assert len(ours.read1(1 << 20)) > 60_000
        stream.write("and on it goes\n")
        assert ours.read1(1 << 20).endswith(b"and on it goes\n")


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, True), ({"TERM": "dumb"}, False), ({"CI": "1"}, False)]
)
def test_only_a_watched_terminal_is_interactive(
    variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_interactive(SafeStream(Terminal())) is expected
    assert not is_interactive(SafeStream(io.StringIO()))
