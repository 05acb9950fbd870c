"""The progress of work before training: reading, learning a tokenizer, tokenizing."""

from __future__ import annotations

import time
from types import TracebackType
from typing import IO, Self

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ultrathink.monitoring.terminal import (
    clean_text,
    error_stream,
    is_interactive,
    make_console,
)
from ultrathink.monitoring.wording import short_number, short_time


class PreparationDisplay:
    """Called with ``(label, done, total)`` while work goes on.

    A ``total`` of 0 is unknown; such work is finished when the next begins. A bar for each label
    on a terminal; elsewhere one line for each label when it is finished.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._given_stream = stream
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._unknown: set[str] = set()  # begun, without a total
        self._finished: set[str] = set()

    def __enter__(self) -> Self:
        self._stream = error_stream(self._given_stream)
        if is_interactive(self._stream):
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=32, complete_style="cyan", finished_style="green"),
                TextColumn("{task.fields[count]}", style="dim"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=make_console(self._stream),
                refresh_per_second=5,
                redirect_stdout=False,
            )
            self._progress.start()
        return self

    def __call__(self, label: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` parts of ``label`` are finished."""
        if label not in self._began:
            self._began[label] = time.monotonic()
            self._finish_unknown()
        self._done[label] = done
        (self._unknown.discard if total > 0 else self._unknown.add)(label)
        if self._progress is not None:
            self._draw(self._progress, label, done, total)
        elif total > 0 and done >= total:
            self._print(label)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_unknown()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _finish_unknown(self) -> None:
        for label in sorted(self._unknown, key=lambda label: self._began[label]):
            if self._progress is not None:
                self._progress.update(self._tasks[label], completed=1, total=1)
            else:
                self._print(label)
        self._unknown.clear()

    def _draw(self, progress: Progress, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = progress.add_task(clean_text(label), total=None, count="")
        count = f"{short_number(done)}/{short_number(total)}" if total > 0 else ""
        known = total if total > 0 else None
        progress.update(self._tasks[label], completed=done, total=known, count=count)

    def _print(self, label: str) -> None:
        if label not in self._finished:
            self._finished.add(label)
            seconds = short_time(time.monotonic() - self._began[label])
            count = f"{self._done[label]:,} in " if self._done[label] else ""
            self._stream.write(f"{clean_text(label)}: {count}{seconds}\n")
