"""Lines that trainers print: a small table of how each names its step, and pairs of name and value.

A line that names a step begins a record; values on other lines belong to the last one, where a
format has such lines. What is printed by several processes is read once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ultrathink.insight.logs.line_log import LineLog, LineReader
from ultrathink.insight.logs.log import LogSignals
from ultrathink.insight.logs.names import STEP, Meaning, is_telling
from ultrathink.insight.logs.numbers import NUMBER, parse_number
from ultrathink.insight.logs.rows import Rows

_ENOUGH = 400  # lines with a step, to tell whose log it is
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_RANK = re.compile(r"^\s*(?:\[?rank[ _]?(?P<a>\d+)\]?\s*:|(?P<b>\d+): )", re.IGNORECASE)
_GAP = re.compile(r"([:=])\s+")
_COLUMNS = re.compile(r"\s*\|\s*|[,;]\s+")
_PARTS = re.compile(r"[,;]\s+|\s{2,}|\t")
_VALUE = rf"(?P<value>{NUMBER})"
_UNIT = r"\s*(?P<unit>[A-Za-z%]*)"
_PAIR = re.compile(rf"(?P<name>[A-Za-z][^:=]*?)\s*[:=]\s*\[?{_VALUE}{_UNIT}")
_TIGHT = re.compile(rf"(?P<name>[A-Za-z_][\w/.\-]*)\s*[:=]\s*\[?{_VALUE}(?P<unit>[A-Za-z%]*)")
_SPACED = re.compile(rf"(?P<name>[A-Za-z][A-Za-z_/ ]*?)\s+{_VALUE}{_UNIT}")
_BACKWARDS = re.compile(rf"{_VALUE}\s*(?P<name>(?:tok|tokens|samples)/s(?:ec)?|ms)$")
_STEP = r"(?P<step>\d[\d,]*)"
_OF = rf"{_STEP}(?:\s*/\s*(?P<total>\d+))?"


@dataclass(frozen=True)
class LineFormat:
    """How somebody's lines name the step, and what is said otherwise than elsewhere.

    ``heads`` find ``step`` (and ``total``, ``epoch``); ``more`` are lines of the record that was
    begun; ``values`` find figures that are not written as pairs, named as the groups are.
    """

    name: str
    heads: tuple[re.Pattern[str], ...]
    more: re.Pattern[str] | None = None
    values: tuple[re.Pattern[str], ...] = ()
    extra: Mapping[str, Meaning] = field(default_factory=dict)


def _format(
    name: str, *heads: str, more: str = "", values: Sequence[str] = (), **extra: str | Meaning
) -> LineFormat:
    return LineFormat(
        name,
        tuple(re.compile(head) for head in heads),
        re.compile(more) if more else None,
        tuple(re.compile(value) for value in values),
        {k: Meaning(v) if isinstance(v, str) else v for k, v in extra.items()},
    )


FORMATS = (
    _format(
        "llm.c's main.log", rf"^s:{_STEP}\s", eval="val_accuracy"
    ),
    _format(
        "llm.c",
        rf"^step\s+{_OF}\s*\|",
        more=r"^val loss",
        ms=Meaning("step_time", factor=1e-3),
    ),
    _format("modded-nanogpt", rf"^step:{_OF}\s+(?=\w+:)"),
    _format("torchtitan", rf"\bstep:\s*{_STEP}\s+(?=(?:loss|grad_norm):)"),
    _format("nanochat", rf"(?i:^step)\s+{_OF}(?:\s*\([\d.]+%\))?\s*\|\s*(?=loss:|Validation)"),
    _format(
        "nanoGPT",
        rf"^iter {_STEP}:\s*(?=loss)",
        rf"^step {_STEP}:\s*(?=train loss)",
        time="step_time",
        train_loss="train_eval_loss",
    ),
    _format(
        "Megatron-LM",
        rf"\biteration\s+{_OF}(?:/infinity)?\s*\|",
        rf"(?:validation|test) loss at iteration\s+{_STEP}[^|]*\|",
    ),
    _format(
        "DeepSpeed",
        rf"\bstep={_STEP}, (?=skipped=)",
        rf"\bglobal_step={_STEP}, ",
        rf"\bEpoch: (?P<epoch>\d+), Step: {_STEP}, Rank: \d+, ",
        more=r"OVERFLOW!|^ppl: ",
        values=(
            r"OVERFLOW!.*[Ll]oss scale: (?P<tried>\d+).*?(?:reducing to (?P<loss_scale>\d+)|$)",
        ),
    ),
    _format("OLMo", rf"\[step={_OF}(?:,[^\]]*)?\]", more=r"^\s+[\w/][^=]*="),
    _format("MaxText", rf"completed step: {_STEP}, ", seconds="step_time"),
    _format("fairseq", rf"(?=.*\"(?:train_)?num_updates\": \"?{_STEP})(?=.*\bloss\").*?\{{"),
    _format(
        "Hugging Face's console, lines counted as steps",
        r"(?=\{'(?:loss|eval_loss)': )",
    ),
    _format(
        "lines with steps",
        rf"(?i:\bepoch\W{{0,3}}(?P<epoch>\d+)[^|\n]*?\b(?:step|iter(?:ation)?|batch)\W{{0,3}}{_OF})",
        r"(?i:(?:^|[\s\[(,|])(?:global[_ ])?(?:step|iter|iteration|update)s?\s*[:=#]?\s*\[?\s*"
        rf"{_OF})\]?",
    ),
)  # fmt: skip


class TextReader(LineReader):
    """Reads the lines of one format; lines at one step become one record."""

    def __init__(self, format: LineFormat, rows: Rows) -> None:
        super().__init__(rows)
        self._format = format
        self._total: int | None = None
        self._step: int | None = None  # of the record that is being read
        self._row: dict[str, float] = {}
        self._coming: dict[str, float] = {}  # told before the step that it belongs to
        self._tried: float | None = None  # the loss scale before it was reduced
        self._rank: str | None = None
        self._last: tuple[int, Mapping[str, float]] | None = None
        self._epoch: int | None = None
        self._offset = 0  # steps of earlier epochs, where each counts its own

    @property
    def total_steps(self) -> int | None:
        """As the lines have it, in ``step 12/6200``."""
        return self._total

    def feed(self, line: str) -> list[LogSignals]:
        """The record that is complete with this line."""
        rank, text = _bare(line)
        self._rank = self._rank or rank
        if rank is not None and rank != self._rank:  # the others say the same
            return []
        head = _head_of(self._format, text)
        if head is None:
            self._add_to_record(text)
            return []
        if "step" not in head.re.groupindex:
            return self._counted(head)
        step = self._count(head)
        if head.re.groupindex.get("total") and head["total"]:
            self._total = int(head["total"])
        pairs = dict(_pairs_beside(self._format, head))
        if not pairs and self._format.more is None:
            return []
        done: list[LogSignals] = []
        if step != self._step or self._is_again(pairs):
            done = self._record()
            self._step, self._row = step, {}
        self._row |= {**pairs, **self._coming}
        if self._tried is not None:  # what the scale fell from is a signal of its own
            done.append(LogSignals(step, {"loss_scale": self._tried}))
        self._coming, self._tried = {}, None
        return done

    def finish(self) -> list[LogSignals]:
        """The record that was waiting for more lines."""
        done = self._record()
        self._row = {}
        return done

    def _add_to_record(self, text: str) -> None:
        more = self._format.more
        if more is None or not more.search(text):
            return
        if (perplexity := re.fullmatch(rf"ppl: ({NUMBER})", text)) is not None:
            value = parse_number(perplexity[1]) or math.nan
            self._row["val_loss"] = math.log(value) if value > 0 else math.nan
            return
        found = [match for pattern in self._format.values if (match := pattern.search(text))]
        for match in found:  # of an overflow
            if self._tried is None:
                self._tried = float(match["tried"])
            self._coming["loss_scale"] = float(match["loss_scale"] or match["tried"])
            self._coming["overflows"] = self._coming.get("overflows", 0.0) + 1
        if not found:
            self._row |= dict(_pairs(text))

    def _counted(self, head: re.Match[str]) -> list[LogSignals]:
        """A record without a step: training lines are counted, others belong to the last one."""
        pairs = dict(_pairs_beside(self._format, head))
        self._step = (self._step or 0) + ("loss" in pairs)
        signals = self.rows.take({**pairs, STEP: self._step})
        return [signals] if signals is not None else []

    def _count(self, head: re.Match[str]) -> int:
        step = int(head["step"].replace(",", ""))
        if "epoch" not in head.re.groupindex or head["epoch"] is None:
            return step
        epoch = int(head["epoch"])
        begins = self._epoch is not None and epoch > self._epoch
        if begins and self._step is not None and step <= self._step - self._offset:
            self._offset = self._step
        self._epoch = epoch
        return self._offset + step

    def _is_again(self, pairs: Mapping[str, float]) -> bool:
        """Whether a line tells anew what the record has, otherwise: the step was taken again."""
        return any(
            name in self._row and self._row[name] != value and not math.isnan(value)
            for name, value in pairs.items()
            if "loss" in name.lower() or name == "trl"
        )

    def _record(self) -> list[LogSignals]:
        if self._step is None or not self._row:
            return []
        signals = self.rows.take({STEP: self._step, **self._row})
        if signals is None or (signals.step, signals.values) == self._last:
            return []
        self._last = signals.step, signals.values
        return [signals]


def text_format(lines: Iterable[str], columns: Mapping[str, str]) -> LineFormat | None:
    """Whose lines these are: the format that reads the most; None where none reads any."""
    counts = dict.fromkeys(range(len(FORMATS)), 0)
    for line in lines:
        _, text = _bare(line)
        for number, known in enumerate(FORMATS):
            head = _head_of(known, text)
            if head is not None and _tells(known, head, columns):
                counts[number] += 1
                break
        if sum(counts.values()) >= _ENOUGH:
            break
    best = max(counts, key=lambda number: counts[number])
    return FORMATS[best] if counts[best] else None


def open_text(path: Path, known: LineFormat, columns: Mapping[str, str]) -> LineLog:
    """The log in lines of a known format."""
    return LineLog(path, known.name, lambda: TextReader(known, Rows(columns, known.extra)))


def _bare(line: str) -> tuple[str | None, str]:
    """The rank that printed a line, where it is named, and the line without it and its colours."""
    text = _ANSI.sub("", line).rpartition("\r")[2].rstrip()
    rank = _RANK.match(text)
    return (rank["a"] or rank["b"], text[rank.end() :].lstrip()) if rank else (None, text)


def _tells(known: LineFormat, head: re.Match[str], columns: Mapping[str, str]) -> bool:
    if known.more is not None:  # what it tells stands on other lines too
        return True
    signals = Rows(columns, known.extra).take({**dict(_pairs_beside(known, head)), STEP: 1})
    return signals is not None and any(is_telling(name) for name in signals.values)


def _head_of(known: LineFormat, text: str) -> re.Match[str] | None:
    return next((match for head in known.heads if (match := head.search(text))), None)


def _pairs_beside(known: LineFormat, head: re.Match[str]) -> list[tuple[str, float]]:
    """The figures of a line that names a step: behind it, or before it where it may end so."""
    pairs = list(_pairs(head.string[head.end() :]))
    if not pairs and known is FORMATS[-1]:
        pairs = list(_pairs(head.string[: head.start()]))
    return pairs


def _pairs(text: str) -> Iterator[tuple[str, float]]:
    """Names and values of a line: ``loss: 3.2``, ``lr=[1e-4]``, ``time 12ms``, ``10 tok/s``."""
    text = _GAP.sub(r"\1", re.sub(r"[\"']", "", text).strip(" {}"))
    for part in (_COLUMNS if "|" in text else _PARTS).split(text):
        found = list(_TIGHT.finditer(part))
        if len(found) < 2:
            patterns = (_PAIR, _SPACED, _BACKWARDS)
            found = [m for pattern in patterns if (m := pattern.match(part.strip()))][:1] or found
        for match in found:
            unit = match.groupdict().get("unit") or ""
            value = parse_number(match["value"])
            if value is not None:
                name = match["name"].strip()
                yield (f"{name} ({unit})" if unit else name), value
