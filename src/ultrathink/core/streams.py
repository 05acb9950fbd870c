"""Standard streams, whose reader may be gone."""

from __future__ import annotations

import os
import sys
from typing import IO, Any

_discarded: dict[int, str] = {}  # descriptor -> why nothing written to it arrives any more


def tell(text: str) -> None:
    """Print to standard error at once; where nobody listens any more, that is no further error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: IO[Any], reason: str = "its reader is gone") -> None:
    """Let a standard stream lead nowhere from now on; other streams are left alone.

    What is still in its buffer would otherwise fail again when Python exits, and turn the exit
    status of a program that did its work into 120. Since writing to it succeeds from then on,
    ``reason`` is kept for ``why_discarded``.
    """
    try:
        descriptor = stream.fileno()
        if descriptor in (1, 2):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            _discarded[descriptor] = reason
    except (AttributeError, OSError, ValueError):
        pass  # no file behind it, or closed already


def why_discarded(stream: IO[Any]) -> str | None:
    """The reason for which ``discard`` was called on a standard stream; None where it was not."""
    try:
        return _discarded.get(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
