"""What worker processes do in the tests of pools; imports little, so that they start quickly."""

from __future__ import annotations

import os
import signal


def double(number: int) -> int:
    return 2 * number


def large(number: int) -> bytes:
    """More than a pipe takes in before somebody reads."""
    return bytes([number]) * 3_000_000


def echo(content: bytes) -> bytes:
    return content


def picky(number: int) -> int:
    if number == 2:
        raise KeyError("two is not served")
    return number


def killed_at_three(number: int) -> int:
    """Dies at 3, as often as it is asked."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leaving_at_three(number: int) -> int:
    if number == 3:
        os._exit(7)
    return number
