"""Standard streams whose reader is gone."""

from __future__ import annotations

import os
from typing import IO, Any


def discard(stream: IO[Any]) -> None:
    """Let a standard stream lead nowhere from now on; other streams are left alone.

    What is still in its buffer would otherwise fail again when Python exits, and turn the exit
    status of a program that did its work into 120.
    """
    try:
        descriptor = stream.fileno()
        if descriptor in (1, 2):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    except (OSError, ValueError):
        pass  # no file behind it, or closed already
