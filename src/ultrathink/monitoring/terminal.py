"""Terminals: whether output is interactive, and streams that cannot end a run."""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import IO, TextIO, cast

from rich.console import Console

from ultrathink.core.streams import discard, why_discarded
from ultrathink.monitoring.health import described

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A full disk may have room again; other errors are permanent.
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT})


class SafeStream:
    """A text stream that drops text where writing fails, instead of ending the run.

    After a permanent failure, as of a closed pipe, it stays silent. ``failure`` is why the last
    text was not written; None where it was.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        # rich replaces sys.stderr by a proxy while a bar is shown.
        self._stream: IO[str] | None = getattr(stream, "rich_proxied_file", stream)
        self.encoding: str = getattr(self._stream, "encoding", None) or "utf-8"
        self.failure: str | None = None

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self.write(text.encode("ascii", "replace").decode())
            except (OSError, ValueError) as error:
                self._note(error)
            else:
                self.flush()
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
                self.failure = why_discarded(self._stream)
            except (OSError, ValueError) as error:
                self._note(error)

    def finish(self) -> None:
        """Drop text that cannot be written: it would fail again when Python exits."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.failure = described(error)
                self._fall_silent()

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno() if self._stream is not None else -1

    def _note(self, error: OSError | ValueError) -> None:
        if isinstance(error, BlockingIOError):  # the reader is slow
            return
        self.failure = described(error)
        if getattr(error, "errno", None) not in _PASSING:
            self._fall_silent()

    def _fall_silent(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            discard(stream, self.failure or "")


def is_interactive(stream: SafeStream) -> bool:
    """Whether ``stream`` is a terminal that can redraw lines, outside of CI."""
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return stream.isatty() and not dumb and not os.environ.get("CI")


def make_console(stream: SafeStream) -> Console:
    """A rich console for a terminal that prints text verbatim: no markup, no emoji."""
    return Console(
        file=cast(TextIO, stream), force_terminal=True, markup=False, emoji=False, highlight=False
    )


def error_stream(stream: IO[str] | None = None) -> SafeStream:
    """``stream``, or standard error: standard output is for results."""
    return SafeStream(stream if stream is not None else sys.stderr)


def clean_text(text: str) -> str:
    """``text`` with control characters replaced, so that no model can control a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n")).expandtabs(4)
