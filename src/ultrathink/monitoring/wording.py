"""Short numbers and times for people."""

from __future__ import annotations

import math


def short_number(value: float) -> str:
    """A count in at most five characters: ``950``, ``18.2k``, ``1.31M``, ``1.2T``."""
    if not math.isfinite(value):
        return str(value)
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def short_time(seconds: float) -> str:
    """A length of time in two units at most: ``42s``, ``4m 10s``, ``3h 05m``, ``2d 4h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600}h"
