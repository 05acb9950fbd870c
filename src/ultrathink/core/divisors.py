"""Divisors of whole numbers."""

from __future__ import annotations


def divisors(number: int) -> list[int]:
    """All divisors of ``number``, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is not above ``most``, at least 1."""
    return max(d for d in divisors(number) if d <= max(1, most))
