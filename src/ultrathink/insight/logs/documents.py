"""Logs that are one JSON document: trainer_state.json, Megatron's series, lists of records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ultrathink.insight.logs.formats import flat
from ultrathink.insight.logs.log import LogError, Row
from ultrathink.insight.logs.names import STEP, can_fail, meaning_of, plain, quantity, whole_number

_MAX_SHOWN = 12
HF, MEGATRON, RECORDS = "Hugging Face trainer_state.json", "Megatron's JSON", "JSON records"


def read_document(path: Path) -> tuple[Any, bool]:
    """A JSON document, and whether it is whole: of one that is cut off, the values before the cut.

    LogError where nothing is whole, or where there is another document behind it.
    """
    text = path.read_text("utf-8", errors="replace")
    try:
        return json.loads(text), True
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise LogError(
                f"{path} holds several JSON documents; split it into one file each."
            ) from None
    except RecursionError:
        pass
    end = max(text.rfind(sign) + (sign != ",") for sign in ",]}")  # behind it a number may be cut
    try:
        return from_json(text[:end], allow_partial=True), False
    except ValueError:
        raise LogError(
            f"{path} is no complete JSON document, and nothing of it is whole."
        ) from None


def rows_of(document: Any, path: Path) -> tuple[str, Sequence[Row], int | None]:
    """Whose document it is, its rows, and the steps that the run is to take."""
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        history = [row for row in document["log_history"] if isinstance(row, dict)]
        is_logged = any("loss" in row for row in history)
        rows = [row for row in history if not (is_logged and "train_loss" in row)]
        return HF, [flat(row) for row in rows], whole_number(document.get("max_steps")) or None
    if isinstance(document, dict) and (series := _series_of(document)):
        return MEGATRON, _rows_of_series(series), None
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        return RECORDS, [flat(row) for row in document], None
    if isinstance(document, dict):
        lists = {name: values for name, values in document.items() if isinstance(values, list)}
        lengths = {len(values) for values in lists.values()}
        if len(lengths) == 1 and lengths != {0}:
            cells = zip(*lists.values(), strict=True)
            return RECORDS, [dict(zip(lists, row, strict=True)) for row in cells], None
    if isinstance(document, dict) and document:
        what = f"an object with the keys {', '.join(list(document)[:_MAX_SHOWN])}"
    else:
        what = f"a JSON {type(document).__name__}" + ("" if document else " with nothing in it")
    raise LogError(
        f"{path} is {what}; a log is a trainer_state.json with log_history, Megatron's series with "
        f"values, or a list of records."
    )


def _series_of(document: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Series by name: ``{"lm loss": {"values": {"5": 12.6}}}``, or lists at an interval."""
    found: dict[str, dict[int, Any]] = {}
    for name, entry in document.items():
        values = entry.get("values") if isinstance(entry, dict) else None
        if isinstance(values, dict):
            found[name] = {int(step): v for step, v in values.items() if step.isdecimal()}
        elif isinstance(values, list):
            first = whole_number(entry.get("start_step")) or 0
            apart = max(1, whole_number(entry.get("step_interval")) or 1)
            found[name] = {first + apart * place: value for place, value in enumerate(values)}
    return found


def _rows_of_series(series: Mapping[str, Mapping[int, Any]]) -> list[Row]:
    """Series as rows. A ``"nan"`` fills the steps that were not recorded, and is a loss that was no
    number only where something else was recorded at the step, or, of a lone series, between
    numbers, unless most of them are ``"nan"``."""
    rows: dict[int, dict[str, Any]] = {
        step: {STEP: step} for step in sorted(set().union(*series.values()))
    }
    finite = {
        name: {step for step, value in values.items() if _is_finite(value)}
        for name, values in series.items()
    }
    for name, values in series.items():
        if plain(name) == STEP or "_vs_samples" in plain(name):
            continue
        ran = set().union(*(steps for other, steps in finite.items() if other != name))
        if not ran and (own := finite[name]):
            inside = {step for step in values if min(own) <= step <= max(own)}
            ran = inside if 2 * len(own) > len(inside) else own
        meaning = meaning_of(name)
        fails = meaning is not None and can_fail(meaning.signal)
        for step, value in values.items():
            if not isinstance(value, str) or _is_finite(value) or (fails and step in ran):
                rows[step][name] = value
    return list(rows.values())


def _is_finite(value: Any) -> bool:
    number, _ = quantity(value)
    return number is not None and math.isfinite(number)
