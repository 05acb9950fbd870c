"""The progress of work before training: reading, training a tokenizer, tokenizing."""

from __future__ import annotations

from typing import IO, Self

from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn

from ultrathink.monitoring.terminal import clean_text, error_stream, is_interactive, make_console
from ultrathink.monitoring.wording import short_number, short_time


class PreparationDisplay:
    """Shows progress; called with ``(label, done, total)``.

    A ``total`` of 0 is unknown; such work is finished when the next label starts. Each label has a
    bar on a terminal, and elsewhere a line when it is finished.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._given_stream = stream
        self._ids: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._stream = error_stream(self._given_stream)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[count]}", style="dim"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=make_console(self._stream),
            refresh_per_second=5,
            redirect_stdout=False,
            disable=not is_interactive(self._stream),
        )
        self._progress.start()
        return self

    def __call__(self, label: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` parts of ``label`` are finished."""
        if label not in self._ids:
            self._finish_unknown()
            self._ids[label] = self._progress.add_task(clean_text(label), total=None, count="")
        was_finished = self._task(label).finished
        count = f"{short_number(done)}/{short_number(total)}" if total > 0 else ""
        self._progress.update(self._ids[label], completed=done, total=total or None, count=count)
        if self._task(label).finished and not was_finished:
            self._print(self._task(label))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish_unknown()
        self._progress.stop()

    def _task(self, label: str) -> Task:
        return self._progress.tasks[self._ids[label]]

    def _finish_unknown(self) -> None:
        for task in self._progress.tasks:
            if task.total is None:
                self._print(task)
                self._progress.update(task.id, completed=1, total=1)

    def _print(self, task: Task) -> None:
        if self._progress.disable:
            count = f"{int(task.completed):,} in " if task.completed else ""
            self._stream.write(f"{task.description}: {count}{short_time(task.elapsed or 0.0)}\n")
