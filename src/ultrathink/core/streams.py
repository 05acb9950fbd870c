"""Standard streams whose reader may have closed."""

from __future__ import annotations

import os
import sys
from typing import IO, Any

_discarded: dict[int, str] = {}  # descriptor -> why its output is discarded


def print_stderr(text: str) -> None:
    """Print to standard error and flush it; if its reader is gone, discard the output."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: IO[Any], reason: str = "its reader is gone") -> None:
    """Redirect a standard stream to the null device from now on; other streams are unchanged.

    Otherwise the rest of its buffer would fail again when Python exits, and change the exit status
    of a successful program to 120. Because writing succeeds from then on, ``why_discarded`` keeps
    the ``reason``.
    """
    try:
        descriptor = stream.fileno()
        if descriptor in (1, 2):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            _discarded[descriptor] = reason
    except (AttributeError, OSError, ValueError):
        pass  # not a file, or already closed


def why_discarded(stream: IO[Any]) -> str | None:
    """The reason given to ``discard`` for a standard stream; None if it was not discarded."""
    try:
        return _discarded.get(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
