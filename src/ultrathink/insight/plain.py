"""Values for JSON."""

from __future__ import annotations

import math
from typing import Any


def without_nan(value: Any) -> Any:
    """``value`` with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return value
