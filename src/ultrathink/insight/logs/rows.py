"""Rows of named values as signals: which column is what, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ultrathink.core.errors import suggestion
from ultrathink.insight.logs.log import LogError, LogSignals
from ultrathink.insight.logs.names import (
    RUN,
    SPLIT,
    SPLITS,
    STEP,
    TOTAL,
    VALIDATION,
    Meaning,
    can_fail,
    is_telling,
    meaning_of,
    of_validation,
    plain,
    without_unit,
)
from ultrathink.insight.logs.numbers import is_absent, parse_number

_MAX_SHOWN = 12  # columns in a message


class Rows:
    """Turns rows into signals, one after the other; it remembers what rows tell together.

    ``columns`` are the user's own, signal -> column; ``extra`` those of a format. A null is a value
    that was not finite where ``null_is_nan``, and else was not recorded.
    """

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        extra: Mapping[str, Meaning] | None = None,
        *,
        null_is_nan: bool = False,
        has_sources: bool = False,
    ) -> None:
        self.total_steps: int | None = None
        self.seen: dict[str, None] = {}  # columns, in order
        self.is_counted = False  # steps are the numbers of rows, for want of a column
        self.has_sources = has_sources
        self._null_is_nan = null_is_nan
        self._extra = dict(extra or {})
        self._given = {column: signal for signal, column in (columns or {}).items()}
        self._meanings: dict[str, Meaning | None] = {}
        self._count = 0
        self._run: str | None = None
        self._skipped = 0.0
        self._has_grad_norm = False

    def take(self, row: Mapping[str, Any]) -> LogSignals | None:
        """The signals of a row; None where it has none."""
        self.seen |= dict.fromkeys(row)
        step, split, run = self._place(row)
        source, run = (run, "") if self.has_sources else ("", run)
        if run != (self._run or ""):
            self._skipped, self._has_grad_norm = 0.0, False
        self._run = run
        best: dict[str, tuple[int, float]] = {}
        for name, value in row.items():
            meaning = self._meaning(name)
            number = self._number(value)
            if meaning is None or number is None or meaning.signal == STEP:
                continue
            signal = of_validation(meaning.signal) if split in VALIDATION else meaning.signal
            if signal is None:
                continue
            if source and signal in ("loss", "val_loss"):
                signal = f"{signal}/{source}"
            if signal not in best or meaning.rank < best[signal][0]:
                best[signal] = meaning.rank, self._summed(meaning, number * meaning.factor)
        values = self._telling({signal: number for signal, (_, number) in best.items()})
        if not values:
            return None
        self._count += 1
        if step is None:
            self.is_counted = True
            step = self._count
        return LogSignals(step, values, run)

    def require(self, rows: Iterable[Mapping[str, Any]], path: object) -> None:
        """Check on the first rows that they tell of a training; LogError says what was seen."""
        found: set[str] = set()
        runs: dict[str, None] = {}
        last = ""
        for row in rows:
            signals = self.take(row)
            run = signals.run if signals is not None else last
            self.has_sources |= run in runs and run != last  # runs do not take turns
            runs[run], last = None, run
            found |= set(signals.values) if signals is not None else set()
        for name in self._given:
            if name not in self.seen:
                raise LogError(
                    f"--columns: {path} has no column {name!r}. {suggestion(name, self.seen)}"
                )
        if not any(is_telling(signal) for signal in found):
            shown = list(self.seen)[:_MAX_SHOWN]
            more = f" and {len(self.seen) - len(shown)} more" if len(self.seen) > _MAX_SHOWN else ""
            raise LogError(
                f"{path}: none of the columns is known as a loss or a gradient norm; seen: "
                f"{', '.join(shown)}{more}. Name them: --columns loss=COLUMN,step=COLUMN"
            )

    def _meaning(self, name: str) -> Meaning | None:
        if name not in self._meanings:
            extra = self._extra
            if name in self._given:  # the user's word, in the unit that the name has
                extra = {without_unit(name)[0]: Meaning(self._given[name], rank=-1)}
            self._meanings[name] = meaning_of(name, extra)
        return self._meanings[name]

    def _number(self, value: Any) -> float | None:
        if value is None and self._null_is_nan:
            return math.nan
        return None if is_absent(value) else parse_number(value)

    def _place(self, row: Mapping[str, Any]) -> tuple[int | None, str, str]:
        """The step of a row, its split and its run."""
        step, rank, split, run = None, 1000, "", ""
        for name, value in row.items():
            meaning = self._meaning(name)
            if meaning is not None and meaning.signal == STEP:
                number = parse_number(value)
                is_whole = number is not None and math.isfinite(number) and number == int(number)
                if number is not None and is_whole and meaning.rank < rank:
                    step, rank = int(number), meaning.rank
                continue
            key = plain(name)
            if key in SPLIT and isinstance(value, str) and value.lower() in SPLITS:
                split = value.lower()
            elif key in RUN and isinstance(value, str):
                run = value
            elif key in TOTAL and (number := parse_number(value)) and math.isfinite(number):
                self.total_steps = int(number)
        return step, split, run

    def _summed(self, meaning: Meaning, number: float) -> float:
        if meaning.since_last and math.isfinite(number):
            self._skipped += number
            return self._skipped
        return number

    def _telling(self, values: dict[str, float]) -> dict[str, float]:
        """Without what only looks like a figure."""
        for loss, other in (("loss", "val_loss"), ("val_loss", "loss")):
            # A table has a cell for the validation loss in every row, NaN where there was none.
            if math.isnan(values.get(loss, 0.0)) and not math.isnan(values.get(other, math.nan)):
                del values[loss]
        if math.isnan(values.get("loss", 0.0)) and math.isnan(values.get("val_loss", 0.0)):
            values.pop("val_loss", None)
        if not self._has_grad_norm and "grad_norm" in values:
            # A norm of zero from the beginning on was not computed.
            self._has_grad_norm = values["grad_norm"] != 0
            if not self._has_grad_norm:
                del values["grad_norm"]
        return {
            signal: value
            for signal, value in values.items()
            if math.isfinite(value) or can_fail(signal)
        }
