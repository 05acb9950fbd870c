"""Numbers as logs write them: ``2.77E+00``, ``10,050``, ``NaN``, ``"inf"``, ``None``."""

from __future__ import annotations

import math
import re
from typing import Any

NUMBER = (
    r"(?:[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)"
    r"|[-+]?(?i:nan|inf(?:inity)?)\b)"
)
_WHOLE = re.compile(NUMBER)
_ABSENT = frozenset({"", "-", "--", "none", "null", "n/a", "na", "<na>"})


def parse_number(value: Any) -> float | None:
    """The number that ``value`` is or spells, NaN and infinities too; None where it is none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            return math.copysign(math.inf, value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text.startswith("tensor("):  # a tensor that was printed
        text = text.removeprefix("tensor(").partition(",")[0].rstrip(")")
    if not _WHOLE.fullmatch(text):
        return None
    return float(text.replace(",", ""))


def is_absent(value: Any) -> bool:
    """Whether a cell says that nothing was recorded."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _ABSENT)
