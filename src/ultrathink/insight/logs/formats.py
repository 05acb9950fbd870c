"""The formats of the lines that trainers print, a row of a table each, and how a line is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ultrathink.insight.logs.log import SAMPLE_ROWS, LogSignals, Parse, Row
from ultrathink.insight.logs.names import (
    NUMBER,
    SPLITS,
    STEP,
    TRAINING,
    Meaning,
    is_telling,
    meaning_of,
    qualified,
    words_of,
)
from ultrathink.monitoring.jsonl import parse_object

_STEP = r"(?P<step>\d[\d,]*)(?![.\d]*\d|[kKmM]\b)"
_OF = rf"{_STEP}(?:\s*/\s*(?P<total>\d+))?"
_EPOCH = r"(?P<epoch>\d+)"
_STEP_WORD = (
    r"(?i:(?:^|[\s\[(,|:])(?:global[_ ])?(?:step|iter|iteration|update)s?\s*[:=#]?\s*\[?\s*"
    rf"{_OF})\]?"
)


@dataclass(frozen=True, eq=False)
class LineFormat:
    """How the lines of a trainer name the step, and what they call otherwise than others do.

    ``heads`` find ``step``, and ``total``, ``epoch``, ``rank`` and ``split`` where they name them;
    the figures follow, as an object of JSON or Python where ``is_object``. ``more`` finds lines of
    the record that was begun, ``ahead`` figures of the next one.
    """

    name: str
    heads: tuple[str, ...]
    names: Mapping[str, Meaning] = field(default_factory=dict)
    more: str = ""
    ahead: str = ""
    is_object: bool = False


# Where two read a line, the first one counts.
# fmt: off
FORMATS = (
    LineFormat("llm.c's main.log", (rf"(?<![\w/])s:{_STEP}\s+(?=t[re]l:|eval:)",),
               {"eval": Meaning("val_accuracy")}),
    LineFormat("llm.c", (rf"(?<![\w/])step\s+{_OF}\s*\|(?=\s*loss\s)",),
               {"ms": Meaning("step_time", factor=1e-3)}, more=r"^val loss "),
    LineFormat("modded-nanogpt", (rf"(?<![\w/])step:{_OF}\s+(?=\w+:)",)),
    LineFormat("torchtitan", (rf"\bstep:\s*{_STEP}\s+(?=(?:loss|grad_norm):)",)),
    LineFormat("torchtune", (rf"(?<![\w|]){_EPOCH}\|{_STEP}\|(?=Loss:)",)),
    LineFormat("nanochat",
               (rf"(?i:\bstep)\s+{_OF}(?:\s*\([\d.]+%\))?\s*\|\s*(?=loss:|Validation)",)),
    LineFormat("nanoGPT",
               (rf"\biter {_STEP}:\s*(?=loss)", rf"(?i:\bstep) {_STEP}:\s*(?=train loss|val loss)"),
               {"time": Meaning("step_time"), "train_loss": Meaning("train_eval_loss")}),
    LineFormat("Megatron-LM",
               (rf"\biteration\s+{_OF}(?:/infinity)?\s*\|",
                rf"\b(?:validation|test) loss at iteration\s+{_STEP} on (?P<split>\w+) set[^|]*\|",
                rf"\b(?P<split>validation|test) loss at iteration\s+{_STEP}[^|]*\|")),
    LineFormat("DeepSpeed",
               (rf"\bstep={_STEP}, (?=skipped=)", rf"\bglobal_step={_STEP}, ",
                rf"\bEpoch: {_EPOCH}, Step: {_STEP}, Rank: (?P<rank>\d+), "),
               {"ppl": Meaning("val_loss", is_perplexity=True)}, more=r"^ppl: ",
               ahead=r"OVERFLOW!.*oss scale: (?P<tried>\d+)(?:.*reducing to (?P<loss_scale>\d+))?"),
    LineFormat("OLMo", (rf"\[step={_OF}(?:,[^\]]*)?\]",), more=r"^\s*[\w/][^=\[]*=\S"),
    LineFormat("MaxText", (rf"completed step: {_STEP}, ",), {"seconds": Meaning("step_time")}),
    LineFormat("lines of JSON", (r'(?=\{\s*")',), is_object=True),
    LineFormat("printed dictionaries", (r"(?=\{\s*')",), is_object=True),
    LineFormat("lines with steps",
               (rf"(?i:\bepoch\W{{0,3}}{_EPOCH}[^|\n]*?\b(?:step|iter(?:ation)?|batch)\W{{0,3}}{_OF})",
                _STEP_WORD)),
    LineFormat("progress bars",
               (rf"(?:(?i:\bepoch)\W{{0,2}}{_EPOCH}[^|\r]*)?\d%\|[^|]*\|\s*{_OF}\s*\[",)),
    LineFormat("lines with epochs", (rf"(?i:\bepoch)\W{{0,3}}{_OF}\]?",)),
)
# fmt: on
_GENERAL = next(known for known in FORMATS if known.name == "lines with steps")

# What stands in front of a line: times, levels, ranks, and loggers behind one of these.
_TAG = (
    r"\[(?!step)[^\[\]{}\"']*\]"  # [2023-04-18 01:46:52,554], [INFO], [rank0], [logging.py:96]
    r"|\d{4}[-/]\d\d[-/]\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:[.,]\d+)?(?:Z|[-+]\d\d:?\d\d)?)?"
    r"|\d\d:\d\d:\d\d(?:[.,]\d+)?"
    r"|(?:DEBUG|INFO|WARN(?:ING)?|ERROR)\b(?::[\w.]+:)?"  # also of logging: INFO:root:
    r"|(?:rank|worker|node|proc|gpu)[-_ ]?\d+\b"
    r"|\d+(?=: )|<std(?:out|err)>"  # srun --label, mpirun
)
_BEHIND = r"(?:\s*[-|:](?=[\s\[<])|:)?\s*"
_LOGGER = r"[A-Za-z_][\w.]*(?::\w+:\d+)?\s+[-|](?=\s)\s*"
_PREFIX = re.compile(rf"\s*(?:{_TAG}){_BEHIND}(?:(?:{_TAG}){_BEHIND}|{_LOGGER})*", re.IGNORECASE)
_RANK = re.compile(
    r"(?:(?<![a-z])(?:rank|default|worker|proc|gpu)|\[\d+,(?=\d+\]<))[-_ :=]?\s*(?P<a>\d+)"
    r"|^\s*(?P<b>\d+): ",
    re.IGNORECASE,
)
_SPLIT = re.compile(rf"(?:^|[\s\[(|:-])({'|'.join(SPLITS)})(?=[\s\])|:-]|$)", re.IGNORECASE)
# A number is no figure where it is part of a version, a date, a time, a fraction or a list.
_VALUE = rf"{NUMBER}(?!\d|[.,]\d|[-:/]\d)"
_UNIT = (
    r"(?P<unit>[A-Za-z%][A-Za-z%/]*"  # 12ms
    r"|\s(?:[mu]?s|secs?|seconds|[KMGT]i?B|%)(?![\w:=/])"  # 12 ms
    r"|\s[A-Za-z%]+(?=\s*(?:[,|;)]|$)|\s{2}))?"  # 12 of another unit
)
_FIGURE = re.compile(
    r"(?<![\w/.])(?P<name>[A-Za-z][\w/.@%-]*(?: [A-Za-z(][\w/.@%()-]*){0,7})"
    rf"(?:\s*[:=]\s*|\s+)\[?(?P<value>{_VALUE}){_UNIT}"
    # the value first, as in "112241 tok/s"
    rf"|(?<![\w.])(?P<first>{NUMBER})(?P<times>[kKmM]?)\s*"
    r"(?P<what>(?:tok|tokens|samples)/s(?:ec)?|ms)(?=\s*(?:[,|;)]|$))"
)
_NESTED = re.compile(r"\s*\(([^()]*)\)")  # behind a figure: other figures of the same thing
_TENSOR = re.compile(r"tensor\(([^(),]*)[^()]*\)")
_PYTHON = {"'": '"', "None": "null", "True": "true", "False": "false", "nan": "NaN"}
_PYTHON |= {"inf": "Infinity"}
_IN_PYTHON = re.compile(r"'|\b(?:None|True|False|nan|inf)\b")


def line_format(lines: Iterable[str], columns: Mapping[str, str]) -> LineFormat | None:
    """The format that reads the most of the first lines with a step; None where none reads any."""
    counts = dict.fromkeys(FORMATS, 0)
    for text in (text for line in lines for text, _ in states_of(line)):
        for known in FORMATS:
            if _is_read(known, text, columns):
                counts[known] += 1
                break
        if sum(counts.values()) >= SAMPLE_ROWS:
            break
    best = max(FORMATS, key=lambda known: counts[known])
    return best if counts[best] else None


def first_rows(lines: Iterable[str], parse: Parse) -> Iterator[Row]:
    """The first rows on these lines, each with the rank that wrote it."""
    rows = (
        row if rank is None else {"rank": rank, **row}
        for line in lines
        for text, rank in states_of(line)
        if (row := parse(text)) and not isinstance(row, LogSignals)
    )
    return islice(rows, SAMPLE_ROWS)


def parse_line(known: LineFormat, line: str) -> Row | None:
    """The row on a line; None where it cannot be read.

    That is also one which names a step and a loss, but without its value, or in other words than
    those of the format.
    """
    row = row_of(known, line)
    if row and STEP in row and not known.is_object and "loss" in line.lower():
        return row if any("loss" in name.lower() for name in row) else None
    if row or known.is_object or known is _GENERAL:
        return row
    other = row_of(_GENERAL, line) or {}
    return None if any(words_of(name)[0] == "loss" for name in other) else {}


def row_of(known: LineFormat, text: str) -> dict[str, Any] | None:
    """The row on a line of a format, empty where it has none; None for half an object."""
    head = next((match for head in known.heads if (match := re.search(head, text))), None)
    if head is None:
        rest = text[len(prefix_of(text)) :]
        if known.ahead and (match := re.search(known.ahead, text)):
            return {name: value for name, value in match.groupdict().items() if value}
        return dict(figures(rest)) if known.more and re.search(known.more, rest) else {}
    row: dict[str, Any] = {name: value for name, value in head.groupdict().items() if value}
    before = text[: head.start()]
    if splits := _SPLIT.findall(before):
        row.setdefault("split", splits[-1])
    if known.is_object:
        found = _object(text[head.start() : text.rfind("}") + 1])
        step = re.search(_STEP_WORD, before)
        if found is None:
            return None if not before or "loss" in text else {}
        return {**({STEP: step["step"]} if step else {}), **row, **found}
    if "epoch" in row and "total" in row:
        row["epoch_steps"] = row.pop("total")
    row[STEP] = row[STEP].replace(",", "")
    pairs = dict(figures(text[head.end() :]))
    if not pairs and not known.more:  # "loss 3.2 at step 10"
        pairs = dict(figures(before[len(prefix_of(before)) :]))
    return {**row, **pairs} if pairs or known.more else {}


def figures(text: str) -> Iterator[tuple[str, str]]:
    """Names and values of a line: ``loss: 3.2``, ``lr=[1e-4]``, ``time 12ms``, ``10 tok/s``.

    A figure in brackets behind another is one of that, and one behind ``val:`` of validation.
    """
    text = _TENSOR.sub(r"\1", text.replace('"', "").replace("'", ""))
    at, split = 0, ""
    while match := _FIGURE.search(text, at):
        if splits := _SPLIT.findall(text[at : match.start()]):
            split = "" if splits[-1].lower() in TRAINING else splits[-1].lower()
        at = match.end()
        name = qualified(match["name"] or match["what"], split)
        yield name, (match["value"] or match["first"]) + (match["unit"] or match["times"] or "")
        if nested := _NESTED.match(text, at):
            at = nested.end()
            yield from ((f"{name} {inner}", value) for inner, value in figures(nested[1]))


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as ``train/loss``; a list of one number as that number."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}/")
        else:
            values[prefix + name] = value[0] if isinstance(value, list) and value else value
    return values


def states_of(line: str, rank: str | None = None) -> Iterator[tuple[str, str | None]]:
    """The texts between carriage returns, as of a progress bar, each with its rank."""
    for text in line.split("\r"):
        rank = rank_of(prefix_of(text)) or rank
        yield text, rank


def prefix_of(line: str) -> str:
    """The beginning of a line that says when, where and by whom it was written."""
    match = _PREFIX.match(line)
    return match[0] if match else ""


def rank_of(prefix: str) -> str | None:
    """The rank of the process that wrote a line; None where the line does not say it."""
    match = _RANK.search(prefix)
    return match["a"] or match["b"] if match else None


def _is_read(known: LineFormat, text: str, columns: Mapping[str, str]) -> bool:
    """Whether a format finds on a line what says how the training goes."""
    row = row_of(known, text)
    if not row or not (STEP in row or known.is_object):
        return False
    if known.more or "train_runtime" in row or set(columns.values()) & row.keys():
        return True
    meanings = (meaning_of(name, known.names) for name in row)
    return any(meaning is not None and is_telling(meaning.signal) for meaning in meanings)


def _object(text: str) -> dict[str, Any] | None:
    """The object of JSON, or of Python as it is printed, with nested names joined."""
    found = parse_object(text)
    if found is None:
        found = parse_object(_IN_PYTHON.sub(lambda match: _PYTHON[match[0]], text))
    return None if found is None else flat(found)
