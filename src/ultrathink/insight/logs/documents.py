"""Logs that are one JSON document: trainer_state.json, Megatron's series, lists of records.

A document is written anew as training goes on, so it is read whole whenever it has changed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ultrathink.insight.logs.json_lines import flat
from ultrathink.insight.logs.log import Log, LogError, LogSignals, News
from ultrathink.insight.logs.names import STEP, can_fail, meaning_of, plain
from ultrathink.insight.logs.numbers import parse_number
from ultrathink.insight.logs.rows import Rows

_SAMPLE_RECORDS = 200
_MAX_SHOWN = 12
_SYNTAX = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\],]', re.DOTALL)
HF, MEGATRON, RECORDS = "Hugging Face trainer_state.json", "Megatron's JSON", "JSON records"


class DocumentLog(Log):
    """A log in one JSON document."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        super().__init__(path, "")
        self._columns = dict(columns)
        self._known: list[LogSignals] = []  # what was told by ``poll``
        self._state: tuple[int, int, int] | None = None
        self._load()

    def signals(self) -> Iterator[LogSignals]:
        """All signals of the document as it is now."""
        yield from self._load()

    def poll(self) -> News:
        """What the document has beyond what it had at the last call."""
        status = self.path.stat()
        state = status.st_ino, status.st_size, status.st_mtime_ns
        if state == self._state:
            return News()
        try:
            found = self._load()
        except LogError:  # it is being written
            return News()
        self._state = state
        known, self._known = self._known, found
        num_same = len(known)
        # A NaN is not equal to itself, but its repr is.
        if repr(found[:num_same]) == repr(known):
            return News(found[num_same:])
        return News(found, is_anew=True)

    def _load(self) -> list[LogSignals]:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        document, is_whole = read_document(text)
        if document is None:
            raise LogError(f"{self.path} is no complete JSON document, and nothing of it is whole.")
        self.format, rows, self.total_steps = _rows_of(document, self.path)
        self.notes = [] if is_whole else ["The document is cut off; what is whole of it was read."]
        Rows(self._columns).require(rows[:_SAMPLE_RECORDS], self.path)
        reader = Rows(self._columns)
        found = [signals for row in rows if (signals := reader.take(row)) is not None]
        self.total_steps = self.total_steps or reader.total_steps
        return found


def read_document(text: str) -> tuple[Any, bool]:
    """A JSON document, and whether it is whole: of one that is cut off, the values before the cut.

    None where nothing can be read.
    """
    try:
        return json.loads(text), True
    except (ValueError, RecursionError):
        pass
    open_now: list[str] = []
    cut, closing = 0, ""
    for match in _SYNTAX.finditer(text):
        sign = match[0]
        if sign in "{[":
            open_now.append("}" if sign == "{" else "]")
        elif sign in "}]":
            if not open_now or open_now.pop() != sign:
                break
            cut, closing = match.end(), "".join(reversed(open_now))
        elif sign == ",":
            cut, closing = match.start(), "".join(reversed(open_now))
    try:
        return json.loads(text[:cut] + closing), False
    except (ValueError, RecursionError):
        return None, False


def _rows_of(document: Any, path: Path) -> tuple[str, list[dict[str, Any]], int | None]:
    """Whose document it is, its rows, and the steps that the run is to take."""
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        history = [row for row in document["log_history"] if isinstance(row, dict)]
        total = parse_number(document.get("max_steps"))
        is_logged = any("loss" in row for row in history)
        rows = [  # without the summary of the run at its end
            flat(row)
            for row in history
            if "train_runtime" not in row and not (is_logged and "train_loss" in row)
        ]
        return HF, rows, int(total) if total and total > 0 else None
    if isinstance(document, dict) and (series := _series_of(document)):
        return MEGATRON, _rows_of_series(series), None
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        return RECORDS, [flat(row) for row in document], None
    if isinstance(document, dict) and (lists := _equal_lists(document)):
        num = len(next(iter(lists.values())))
        rows = [{name: values[place] for name, values in lists.items()} for place in range(num)]
        return RECORDS, rows, None
    if isinstance(document, dict) and document:
        seen = ", ".join(list(document)[:_MAX_SHOWN])
        what = f"an object with the keys {seen}"
    else:
        what = f"a JSON {type(document).__name__}" + ("" if document else " with nothing in it")
    raise LogError(
        f"{path} is {what}; a log is a trainer_state.json with log_history, Megatron's series with "
        f"values, or a list of records."
    )


def _equal_lists(document: Mapping[str, Any]) -> dict[str, list[Any]]:
    lists = {name: value for name, value in document.items() if isinstance(value, list) and value}
    return lists if len({len(values) for values in lists.values()}) == 1 else {}


def _series_of(document: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Series by name: ``{"lm loss": {"values": {"5": 12.6}}}``, or lists at an interval."""
    found: dict[str, dict[int, Any]] = {}
    for name, entry in document.items():
        values = entry.get("values") if isinstance(entry, dict) else None
        if isinstance(values, dict):
            found[name] = {int(step): v for step, v in values.items() if step.isdecimal()}
        elif isinstance(values, list):
            begin, interval = (entry.get(key) for key in ("start_step", "step_interval"))
            first = begin if isinstance(begin, int) else 0
            apart = interval if isinstance(interval, int) and interval > 0 else 1
            found[name] = {first + apart * place: value for place, value in enumerate(values)}
    return found


def _rows_of_series(series: Mapping[str, Mapping[int, Any]]) -> list[dict[str, Any]]:
    steps = sorted(set().union(*series.values()))
    rows: dict[int, dict[str, Any]] = {step: {STEP: step} for step in steps}
    finite = {
        name: {step for step, value in values.items() if _is_finite(value)}
        for name, values in series.items()
    }
    for name, values in series.items():
        if plain(name) == STEP or "_vs_samples" in plain(name):
            continue
        elsewhere = {step for other in series if other != name for step in finite[other]}
        ran = elsewhere or _between(values, finite[name])
        for step, value in values.items():
            if not _is_unrecorded(name, value, step in ran):
                rows[step][name] = value
    return list(rows.values())


def _is_finite(value: Any) -> bool:
    number = parse_number(value)
    return number is not None and math.isfinite(number)


def _between(values: Mapping[int, Any], finite: set[int]) -> set[int]:
    """Of a lone series, the steps that ran: all between numbers, unless most have none."""
    first, last = min(finite, default=0), max(finite, default=0)
    inside = {step for step in values if first <= step <= last}
    return inside if 2 * len(finite) > len(inside) else finite


def _is_unrecorded(name: str, value: Any, has_run: bool) -> bool:
    """Whether a ``"nan"`` says that there was no record of the step.

    Steps without a record are filled with that text, at either end as a rule, and a loss that was
    not a number is written so too: it was one where ``has_run`` says that the step was recorded
    otherwise.
    """
    number = parse_number(value)
    if number is None or not isinstance(value, str) or not math.isnan(number):
        return number is None  # what is no text is a value
    meaning = meaning_of(name)
    return not has_run or meaning is None or not can_fail(meaning.signal)
