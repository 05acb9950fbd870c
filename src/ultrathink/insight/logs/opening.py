"""Recognizing whose log a file is, by what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path

from ultrathink.core.errors import closest
from ultrathink.data.file_kinds import GZIP, kind_of
from ultrathink.insight.logs.files import DocumentLog, all_lines, decoded, open_lines, our_log
from ultrathink.insight.logs.formats import line_format, parse_line, prefix_of
from ultrathink.insight.logs.log import Log, LogError, NotYetError
from ultrathink.insight.logs.run_folder import RunFolderLog
from ultrathink.insight.logs.tables import NAMES, find_table
from ultrathink.monitoring.jsonl import METRICS_FILE, parse_object
from ultrathink.runs.folder import RunFolder

_SAMPLE_BYTES = 2**20
_KINDS = (
    "a run folder, metrics.jsonl, trainer_state.json, CSV, Megatron's JSON, lines of JSON, or what "
    "trainers print (llm.c, DeepSpeed, Megatron-LM, nanoGPT, torchtitan, OLMo)"
)


def open_log(path: str | Path, columns: Mapping[str, str] | None = None) -> Log:
    """The training log in a file, or of a run (its folder or name), recognized by its content.

    ``columns`` says which column is which signal, ``{"loss": "train_loss"}``. Raises NotYetError
    where there is none yet, and LogError where it is no log, or its columns cannot be guessed.
    """
    place = Path(path)
    given = dict(columns or {})
    if not place.exists() and (Path("runs") / place / METRICS_FILE).is_file():
        place = Path("runs") / place
    if place.is_dir():
        return _open_folder(place, given)
    if not place.exists():
        raise NotYetError(f"there is no file {str(path)!r}{_nearest(place)}")
    with place.open("rb") as file:
        data = file.read(_SAMPLE_BYTES)
    if not data.strip():
        raise NotYetError(f"{place} is empty: there is nothing to watch yet.")
    _refuse_binary(place, data)
    lines = decoded(data).replace("\r\n", "\n").split("\n")
    if len(data) < place.stat().st_size:
        lines = lines[:-1]  # cut off by the limit
    return _recognized(place, lines, given)


def _recognized(path: Path, lines: list[str], columns: dict[str, str]) -> Log:
    first = next(line for line in lines if line.strip()).strip()
    row = parse_object(first) if first[0] == "{" else None
    is_ours = row is not None and {"step", "time"} <= row.keys() and not columns
    if row is not None and is_ours and row.get("split") in ("train", "val"):
        return our_log(path)
    if first in ("{", "[") or (row is not None and _is_document(row)):
        return DocumentLog(path, columns)
    table = find_table(lines) if first[0] != "{" else None
    known = None
    if table is None or not (columns or table.is_known):
        known = line_format((line for line, _ in all_lines(path)), columns)
    if known is not None:
        parse, joins = partial(parse_line, known), not known.is_object
        return open_lines(path, known.name, lambda: parse, columns, known.names, joins=joins)
    if table is not None:
        return open_lines(path, NAMES[table.delimiter], partial(copy, table), columns)
    if first[0] in "{[" and not prefix_of(first):
        return DocumentLog(path, columns)
    raise NotYetError(f"{path} is no training log that is known here; known are {_KINDS}.")


def _is_document(row: dict[str, object]) -> bool:
    """Whether one line is a whole log."""
    nested = [v.get("values") for v in row.values() if isinstance(v, dict)]
    series = [v for v in nested if isinstance(v, dict | list)]
    lists = [v for v in row.values() if isinstance(v, list) and len(v) > 1]
    return "log_history" in row or bool(series) or (len(lists) > 1 and len(lists) == len(row))


def _open_folder(folder: Path, columns: dict[str, str]) -> Log:
    if (folder / METRICS_FILE).is_file():
        if columns:
            raise LogError("--columns: the columns of a run folder are known; leave it out.")
        if not (folder / METRICS_FILE).read_bytes().strip():
            raise NotYetError(f"{folder / METRICS_FILE} is empty: there is nothing to watch yet.")
        return RunFolderLog(RunFolder(folder))
    state = folder / "trainer_state.json"
    if state.is_file():
        return open_log(state, columns)
    names = sorted(entry.name for entry in folder.iterdir())[:8]
    held = f"it holds {', '.join(names)}" if names else "it is empty"
    raise NotYetError(
        f"{folder} is a folder without {METRICS_FILE} or trainer_state.json ({held}); name the "
        f"file of the log."
    )


def _refuse_binary(path: Path, data: bytes) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise LogError(f"{path} is text in UTF-16; write it in UTF-8 first.")
    gzip = ("compressed by gzip", "decompress it first: gunzip {}")
    if found := gzip if data.startswith(GZIP) else kind_of(data):
        kind, advice = found
        fix = advice.format(path) if "first" in advice else f"known are {_KINDS}"
        raise LogError(f"{path} is {kind}, no training log; {fix}.")


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r} either."
    there = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    runs = [entry.parent.name for entry in Path("runs").glob(f"*/{METRICS_FILE}")]
    near = closest(path.name, [*there, *runs], cutoff=0.7)
    if near is not None:
        return f" and no run of that name. Did you mean {near!r}?"
    known = f" Runs: {', '.join(sorted(runs)[:8])}." if runs else ""
    return f" and no run of that name.{known}"
