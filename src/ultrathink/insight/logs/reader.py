"""Rows of named values, one after the other, as signals; which column is what says a sample."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from ultrathink.core.errors import suggestion
from ultrathink.insight.logs.formats import states_of
from ultrathink.insight.logs.log import LogError, LogSignals, Parse, Row
from ultrathink.insight.logs.names import (
    ALIASES,
    ROLES,
    SCORED,
    SPLITS,
    STEP,
    TRAINING,
    Meaning,
    can_fail,
    factor_of,
    given_meaning,
    is_absent,
    is_telling,
    meaning_of,
    plain,
    qualified,
    quantity,
    whole_number,
    words_of,
)
from ultrathink.insight.logs.order import WRITERS, StepOrder

_MAX_SHOWN = 12  # columns in a message


class Columns:
    """The columns of a log: for each signal the surest one, which is read in all rows.

    ``rows`` are the first ones of the log; ``given`` the user's names, signal -> column;
    ``extra`` names with another meaning in this format.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        given: Mapping[str, str] | None = None,
        extra: Mapping[str, Meaning] | None = None,
    ) -> None:
        self.given = {column: signal for signal, column in (given or {}).items()}
        self._extra = extra or {}
        self._meanings: dict[str, Meaning | None] = {}
        self._owners: dict[str, str] = {}  # signal -> the column that it is read from
        self._sources: dict[str, str] = {}  # the first one of each column of sources
        sample = [part for row in rows for part in by_run(row, self.given)]
        self._summary = next((row for row in sample if is_summary(row)), None)
        sample = [row for row in sample if not is_summary(row)]
        self._seen = {name: None for row in sample for name in row}  # in order
        cells = {name: [row.get(name) for row in sample] for name in self._seen}
        self._turning = {name for name in cells if self.role(name) and _takes_turns(cells[name])}
        self._splits = {
            name for name in cells if any(str(x).lower() in SPLITS for x in cells[name])
        }
        self._choose(sample)
        self.has_loss = "loss" in self._owners
        self.sparse = {name for name in cells if _is_sparse(cells[name])}
        self._epoch = next((name for name in self._seen if plain(name) == "epoch"), "epoch")
        self.step = self._step_column(sample)
        # Lines without steps, whose fractions of epochs and learning rates stand there in groups.
        lr = self._owners.get("lr", "")
        keys = [(self.epoch_of(row), row[lr]) for row in sample if not is_absent(row.get(lr))]
        groups = [len(list(group)) for _, group in groupby(keys)]
        self._is_of_several = self.step is None and len(groups) > 3 and min(groups[:-1]) > 1
        self._is_of_several &= any(epoch is not None and epoch % 1 for epoch, _ in keys)
        tags = {str(rank) for row in sample if (rank := self.value(row, "rank")) is not None}
        self.rank = min(tags, key=lambda tag: (len(tag), tag), default="")
        self._untagged = {self._shape(row) for row in sample if self.value(row, "rank") is None}

    def role(self, name: str) -> str:
        """What a column says of where its row belongs, as in ``ROLES``; empty for a figure."""
        if self.given.get(name) == "run":
            return "run"
        found = self._meaning(name)
        return STEP if found is not None and found.signal == STEP else ROLES.get(plain(name), "")

    def value(self, row: Row, role: str) -> Any:
        """The value of the first column with a role; None where the row has none."""
        values = (row[name] for name in row if self.role(name) == role)
        return next((value for value in values if not is_absent(value)), None)

    def place(self, row: Row) -> tuple[str, str, str]:
        """The split, the source and the run of a row; each empty where it says nothing."""
        split = source = run = ""
        for name, value in row.items():
            role, text = "" if is_absent(value) else self.role(name), str(value)
            turns = name in self._turning
            if role == "split" and (turns or name in self._splits or text.lower() in SPLITS):
                split = "" if text.lower() in TRAINING else text.lower()
            elif role == "run" or (role and plain(name) == "source" and not turns):
                run = run or text
            elif role == "source" and (turns or text != self._sources.setdefault(name, text)):
                source = text
        return split, source, run

    def is_of_another_rank(self, row: Row) -> bool:
        """Whether another process than the one that is read wrote this row."""
        rank = self.value(row, "rank")
        if rank is None:
            return False
        self.rank = self.rank or str(rank)
        return str(rank) != self.rank or self._shape(row) in self._untagged

    def column(self, name: str) -> Meaning | None:
        """What a column is read as: all but the surest one for a signal keep their own names."""
        found = self._meaning(name)
        if found is None or self._owners.setdefault(found.signal, name) == name:
            return found
        return None if plain(name) in ALIASES else Meaning(name.strip())

    def step_of(self, row: Row) -> int | None:
        """The step of a row, in the column of steps or in one of that name with a split."""
        base = words_of(self.step)[0] if self.step is not None else None
        names = [name for name in row if name == self.step or words_of(name)[0] == base]
        return next((step for name in names if (step := whole_number(row[name])) is not None), None)

    def epoch_of(self, row: Row) -> float | None:
        """The epoch of a row, where it is not its step."""
        epoch = quantity(row.get(self._epoch))[0] if self._epoch != self.step else None
        return epoch if epoch is not None and math.isfinite(epoch) else None

    def require(self, path: object, *, is_known: bool = False) -> None:
        """LogError where no column says how the training goes, unless the format ``is_known``."""
        for name in self.given:
            if name not in self._seen:
                raise LogError(
                    f"--columns: {path} has no column {name!r}. {suggestion(name, self._seen)}"
                )
        if self._is_of_several and not self.rank:
            raise LogError(f"{path} {WRITERS}")
        if is_known or any(is_telling(signal) for signal in self._owners):
            return
        if self._summary and not self._seen:
            loss = quantity(self._summary.get("train_loss"))[0]
            held = "" if loss is None else f" (train_loss {loss:.4g})"
            raise LogError(
                f"{path} holds only the final summary{held}, and no step; let the trainer log "
                f"steps: logging_steps=10"
            )
        hidden = len(self._seen) - _MAX_SHOWN
        more = f" and {hidden} more" if hidden > 0 else ""
        raise LogError(
            f"{path}: none of the columns is known as a loss or a gradient norm; seen: "
            f"{', '.join(list(self._seen)[:_MAX_SHOWN]) or 'none'}{more}. Name them: "
            f"--columns loss=COLUMN,step=COLUMN"
        )

    def _shape(self, row: Row) -> frozenset[str]:
        return frozenset(name for name in row if self.role(name) != "rank")

    def _choose(self, sample: Sequence[Row]) -> None:
        """Find the surest column for each signal among those that have numbers in these rows."""
        ranks: dict[str, int] = {}
        for row in sample:
            split, _, _ = self.place(row)
            for name, value in row.items():
                if self.role(name) or quantity(value)[0] is None:
                    continue
                found = self._meaning(full := qualified(name, split))
                if found is None or factor_of(found.signal, quantity(value)[1]) is None:
                    continue
                if found.rank < ranks.get(found.signal, 10**6):
                    ranks[found.signal], self._owners[found.signal] = found.rank, full

    def _meaning(self, name: str) -> Meaning | None:
        if name not in self._meanings:
            split, _, rest = name.partition("_")
            if name in self.given:
                found: Meaning | None = given_meaning(name, self.given[name])
            elif rest in self.given and split in SPLITS:
                found = meaning_of(f"{split}_{self.given[rest]}")
            else:
                found = meaning_of(name, self._extra)
            self._meanings[name] = found
        return self._meanings[name]

    def _step_column(self, sample: Sequence[Row]) -> str | None:
        """The surest name of a step with whole numbers; an epoch only where each has one loss."""
        found = {name: self._meaning(name) for name in self._seen if self.role(name) == STEP}
        ranks = {name: one.rank for name, one in found.items() if one is not None}
        loss = self._owners.get("loss", "")
        for name in sorted(ranks, key=lambda name: ranks[name]):
            rows = [row for row in sample if not is_absent(row.get(name))]
            trained = [row[name] for row in rows if not is_absent(row.get(loss))]
            repeats = any(one == other for one, other in pairwise(trained))
            num_whole = sum(whole_number(row[name]) is not None for row in rows)
            is_epoch = name == self._epoch
            if 2 * num_whole > len(rows) and not (is_epoch and (repeats or num_whole < len(rows))):
                return name
        return None


class Reader:
    """Reads the lines of a log, or its rows, in order; it knows what rows say together.

    Lines at one step become one record where ``joins``. A null is a value that was not finite where
    ``null_is_nan``, and else was not recorded.
    """

    def __init__(
        self,
        columns: Columns,
        parse: Parse = lambda line: None,
        *,
        joins: bool = False,
        null_is_nan: bool = False,
    ) -> None:
        self.total_steps: int | None = None
        self.num_unread = 0
        self._columns = columns
        self._parse = parse
        self._joins = joins
        self._null_is_nan = null_is_nan
        self._first_unread = ""
        self._has_other_ranks = False
        self._runs: dict[str, _Run] = {}
        self._pending: Row = {}  # the record that waits for more lines
        self._ahead: Row = {}  # figures of the next record
        self._rank: str | None = None  # in front of a line that is not at its end

    def feed(self, line: str) -> list[LogSignals]:
        """The signals that are complete with this line, or with these states of a progress bar."""
        found: list[LogSignals] = []
        for text, rank in states_of(line, self._rank):
            row = self._parse(text)
            if isinstance(row, LogSignals):
                found.append(row)
            elif row is None:
                self._left_out(text.strip())
            elif row:
                row = row if rank is None else {"rank": rank, **row}
                found += self._join(row) if self._joins else self.take(row)
            self._rank = rank if line.endswith("\r") else None
        return found

    def take(self, row: Row) -> list[LogSignals]:
        """The signals of a row, in each run that it has figures of."""
        parts = by_run(row, self._columns.given)
        return [found for part in parts if (found := self._signals(part)) is not None]

    def finish(self) -> list[LogSignals]:
        """The record that was waiting for more lines."""
        row, self._pending = self._pending, {}
        return self.take(row) if row else []

    def notes(self, *, is_torn: bool = False) -> list[str]:
        """What was not read, in sentences."""
        notes = ["The last line is torn and was left out."] if is_torn else []
        if num := self.num_unread - is_torn:
            lines = "1 line or cell was" if num == 1 else f"{num:,} lines or cells were"
            notes.append(f"{lines} not understood and left out, the first: {self._first_unread}")
        if self._has_other_ranks:
            rank = self._columns.rank
            notes.append(f"Several processes wrote this log; the lines of rank {rank} were read.")
        return notes

    def _left_out(self, text: str) -> None:
        self.num_unread += bool(text)
        self._first_unread = self._first_unread or text[:80]

    def _join(self, row: Row) -> list[LogSignals]:
        """Lines of one step as one record; a line without a step belongs to the last one."""
        if self._is_of_another_rank(row):
            return []
        if "tried" in row:  # the loss scale of the last step, and of the next one
            if self._pending:
                self._pending = {"loss_scale": row["tried"], **self._pending}
            self._ahead = {"loss_scale": row.get("loss_scale", row["tried"])}
            return []
        before = self._pending
        is_same = before and row.get(STEP, before[STEP]) == before[STEP]
        if is_same and row.get("split") == before.get("split") and not _differs(row, before):
            self._pending = {**before, **row}
            return []
        done = self.finish()
        if STEP in row:
            self._pending, self._ahead = {**row, **self._ahead}, {}
        return done

    def _is_of_another_rank(self, row: Row) -> bool:
        is_other = self._columns.is_of_another_rank(row)
        self._has_other_ranks |= is_other
        return is_other

    def _signals(self, row: Row) -> LogSignals | None:
        columns = self._columns
        if is_summary(row) or (not self._joins and self._is_of_another_rank(row)):
            return None
        step_cell = row.get(columns.step or "")
        if not is_absent(step_cell) and whole_number(step_cell) is None:
            self._left_out(f"{columns.step}: {step_cell}")
            return None
        split, source, name = columns.place(row)
        self.total_steps = whole_number(columns.value(row, "total")) or self.total_steps
        run = self._runs.setdefault(name, _Run(is_one_run=bool(name)))
        values: dict[str, float] = {}
        counts = set()  # signals that count since the last line
        for column, cell in row.items():
            found = None if columns.role(column) else self._figure(column, split, cell)
            if found is not None:
                signal, value, since_last = found
                if source and (signal in SCORED or signal not in ALIASES):
                    signal = f"{signal}/{source}"
                values[signal] = value
                counts |= {signal} if since_last else set()
        values = run.telling(values)
        step = run.order.take(self._step(row, run, values), values) if values else None
        if step is None:
            return None
        values |= {signal: run.summed(signal, values[signal]) for signal in counts & values.keys()}
        label = name or (f"run {run.order.run}" if run.order.run > 1 else "")
        return LogSignals(step, values, label, run.order.undone)

    def _figure(self, name: str, split: str, cell: Any) -> tuple[str, float, bool] | None:
        """The signal of a cell, its value, and whether that is a count since the last line."""
        full = qualified(name, split)
        column, (number, unit) = self._columns.column(full), quantity(cell)
        if cell is None and self._null_is_nan:
            number = math.nan
        if number is None and isinstance(cell, str) and column is not None and not is_absent(cell):
            self._left_out(f"{name}: {cell}" if column.signal in ALIASES else "")
        if column is None or number is None:
            return None
        if math.isnan(number) and name in self._columns.sparse:
            return None
        factor = factor_of(column.signal, unit, column.factor)
        if factor is None:  # another figure
            column = self._columns.column(f"{full} ({unit.replace(',', 'with commas')})")
            if column is None:
                return None
            factor = column.factor
        value = number * factor
        if column.is_perplexity:
            value = math.log(value) if value > 0 else math.nan
        return column.signal, value, column.since_last

    def _step(self, row: Row, run: _Run, values: Mapping[str, float]) -> int:
        step, epoch = self._columns.step_of(row), self._columns.epoch_of(row)
        if step is not None:
            return run.over_epochs(step, epoch, whole_number(self._columns.value(row, "length")))
        if self._columns.step is not None:  # the row belongs to the last one
            return run.order.newest
        return run.count(epoch, is_step="loss" in values or not self._columns.has_loss)


class _Run:
    """What is remembered of one run of a log."""

    def __init__(self, *, is_one_run: bool) -> None:
        self.order = StepOrder(is_one_run=is_one_run)
        self._sums: defaultdict[tuple[int, str], float] = defaultdict(float)
        self._has_grad_norm = False
        self._epochs: list[float] = []  # of the rows that were counted as steps
        self._offsets: dict[int, int] = {}  # steps of earlier epochs, where each counts its own
        # The epoch, the step in it, and the steps since the one before.
        self._last: tuple[int, int, int] | None = None

    def summed(self, signal: str, count: float) -> float:
        """How many there were so far, with those since the last line."""
        key = self.order.run, signal
        self._sums[key] += count if math.isfinite(count) else 0.0
        return self._sums[key]

    def count(self, epoch: float | None, *, is_step: bool) -> int:
        """The number of a row without a step; an epoch that goes back takes the count with it."""
        if is_step:
            epoch = -math.inf if epoch is None else epoch
            if self._epochs and epoch < self._epochs[-1]:
                self._epochs = [one for one in self._epochs if one < epoch]
            self._epochs.append(epoch)
        return len(self._epochs)

    def over_epochs(self, step: int, epoch: float | None, length: int | None) -> int:
        """A step over all epochs, where each counts its own; ``length`` steps, if that is known."""
        if epoch is None:
            return step
        now = math.floor(epoch)
        before, last, stride = self._last or (now, step, 0)
        if now > before:
            # Without a length, it ends with the last step that was logged, counted from 0 or 1.
            passed = length * (now - before) if length else last + (stride if step == 0 else 0)
            self._offsets[now] = self._offsets.get(before, 0) + (passed if step <= last else 0)
        self._last = now, step, step - last if now == before else stride
        return self._offsets.get(now, 0) + step

    def telling(self, values: dict[str, float]) -> dict[str, float]:
        """The values without what only looks like a figure."""
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
        return {name: x for name, x in values.items() if math.isfinite(x) or can_fail(name)}


def by_run(row: Row, given: Container[str] = ()) -> list[Row]:
    """A row for each run of an export of Weights & Biases, whose columns are ``run-7 - loss``."""
    if not any(" - " in name for name in row):
        return [row]
    shared: dict[str, Any] = {}
    runs: dict[str, dict[str, Any]] = {}
    for name, value in row.items():
        run, _, base = ("", "", name) if name in given else name.rpartition(" - ")
        (runs.setdefault(run, {}) if run else shared)[base] = value
    if len(runs) < 2:
        return [{**shared, **next(iter(runs.values()), {})}]
    return [{**shared, "run": run, **part} for run, part in runs.items()]


def is_summary(row: Row) -> bool:
    """Whether a row is the summary with which Hugging Face's trainer ends, which is no step."""
    return "train_runtime" in row


def _differs(row: Row, other: Row) -> bool:
    """Whether both have a figure with different values, as of a repeated step."""
    return any(
        name in other and repr(other[name]) != repr(value)
        for name, value in row.items()
        if quantity(value)[0] is not None
    )


def _takes_turns(cells: Iterable[Any]) -> bool:
    """Whether a value comes back after another."""
    runs = [value for value, _ in groupby(str(cell) for cell in cells if not is_absent(cell))]
    return len(set(runs)) < len(runs)


def _is_sparse(cells: Iterable[Any]) -> bool:
    """Whether NaN means "not recorded": most values are NaN, with numbers between them."""
    known = [number for cell in cells if (number := quantity(cell)[0]) is not None]
    num_back = sum(math.isnan(one) and not math.isnan(other) for one, other in pairwise(known))
    return num_back > 1 and 2 * sum(map(math.isnan, known)) > len(known)
