"""Lengths of training: steps, a share of the run, tokens or minutes, resolved to steps once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["steps", "ratio", "tokens", "minutes"]

_SUFFIXES = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_UNITS: dict[str, Unit] = {
    "%": "ratio",
    "step": "steps",
    "token": "tokens",
    "minute": "minutes",
    "min": "minutes",
}
_PATTERN = re.compile(
    r"^\s*(?P<number>\d[\d_]*(?:\.\d+)?|\.\d+)\s*(?P<scale>[kKmMbB]?)\s*"
    r"(?P<unit>%|steps?|tokens?|minutes?|min)?\s*$"
)


@dataclass(frozen=True)
class Duration:
    """A length of training: ``100`` steps, ``0.1`` or ``"10%"`` of it, ``"2M tokens"``,
    ``"3 minutes"``."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: int | float | str) -> Duration:
        """Read a duration; an integer counts steps, a fraction below 1 is a share of the run."""
        if isinstance(text, bool):
            raise ValueError(_advice(text))
        match = _PATTERN.match(text if isinstance(text, str) else _without_exponent(text))
        if match is None:
            raise ValueError(_advice(text))
        number = float(match["number"].replace("_", "")) * _SUFFIXES[match["scale"].lower()]
        unit = _UNITS.get((match["unit"] or "").rstrip("s"))
        if unit is None:
            has_point = "." in match["number"] and match["scale"] == ""
            unit = "ratio" if has_point or isinstance(text, float) else "steps"
        if match["unit"] == "%":
            number /= 100
        if unit == "ratio" and number > 1:
            raise ValueError(f"a share of the run is between 0 and 1 (0% and 100%), not {number}")
        if not math.isfinite(number) or (unit == "steps" and number != int(number)):
            raise ValueError(_advice(text))
        return cls(number, unit)

    def to_steps(self, *, total_steps: int, tokens_per_step: int, seconds_per_step: float) -> int:
        """The nearest whole number of optimizer steps, given the run's length and speed."""
        if self.unit == "steps":
            return int(self.value)
        if self.unit == "ratio":
            return round(self.value * total_steps)
        if self.unit == "tokens":
            return math.ceil(self.value / tokens_per_step)
        return round(self.value * 60 / max(seconds_per_step, 1e-9))

    def __str__(self) -> str:
        """The text that ``parse`` reads as the same length."""
        amount = _without_exponent(float(self.value))
        if self.unit == "ratio":
            return amount if "." in amount else f"{amount}.0"
        amount = amount.removesuffix(".0")
        return amount if self.unit == "steps" else f"{amount} {self.unit}"


def _without_exponent(number: float) -> str:
    return format(Decimal(repr(number)), "f")


def _advice(text: object) -> str:
    return (
        f"{text!r} is not a length of training; write steps (100), a share of the run (0.1 or "
        f"10%), tokens ('2M tokens') or minutes ('3 minutes')"
    )
