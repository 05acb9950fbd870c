"""The printable characters that GPT-2's vocabularies, and those after it, write for bytes."""

from __future__ import annotations


def _byte_of_name() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {chr(value): value for value in printable}
    others = (value for value in range(256) if value not in printable)
    names.update({chr(256 + position): value for position, value in enumerate(others)})
    return names


BYTE_OF_NAME = _byte_of_name()
"""Each of the 256 characters, and its byte."""
