"""What a run writes down about itself besides metrics: every change, message and checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ultrathink.monitoring.appending import ResilientAppender
from ultrathink.monitoring.health import Health
from ultrathink.monitoring.jsonl import line_appender
from ultrathink.monitoring.records import Level, RunInfo, Tell
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, Ending, StepReport
from ultrathink.training.control import Change


class RunLog(Callback):
    """Appends changes to ``decisions.jsonl``, messages and checkpoints to ``logs/run.log``.

    Lines that cannot be written wait until they can. ``tell`` is how the run hears of that; without
    it only the log itself does.
    """

    def __init__(self, run: RunFolder, tell: Tell | None = None) -> None:
        self.run = run
        self._tell = tell if tell is not None else self.on_message
        self._log = _Watched(line_appender(run.logs / "run.log"), "logs/run.log")
        self._decisions = _Watched(line_appender(run.decisions), "decisions.jsonl")

    def on_start(self, info: RunInfo) -> None:
        if info.start_step:
            appender = line_appender(self.run.decisions, cut_beyond=info.start_step)
            self._decisions = _Watched(appender, "decisions.jsonl")
            self._do(self._decisions, ResilientAppender.flush)
        self.on_message(f"training starts after step {info.start_step}", "info")

    def on_step(self, report: StepReport) -> None:
        for file in (self._log, self._decisions):
            if file.appender.is_waiting:
                self._do(file, ResilientAppender.flush)

    def on_change(self, change: Change) -> None:
        record = json.dumps({"time": time.time(), **asdict(change)}, ensure_ascii=False)
        self._append(self._decisions, record)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.on_message(f"checkpoint of step {step} written", "info")

    def on_message(self, text: str, level: Level) -> None:
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append(self._log, f"{moment} {level}: {text}")

    def on_end(self, ending: Ending | None) -> None:
        for file in (self._decisions, self._log):
            self._do(file, ResilientAppender.close)

    def _append(self, file: _Watched, line: str) -> None:
        entry = f"{line}\n".encode(errors="backslashreplace")
        self._do(file, lambda appender: appender.append(entry))

    def _do(self, file: _Watched, action: Callable[[ResilientAppender], None]) -> None:
        try:
            action(file.appender)
        except OSError as error:
            notes = file.health.failed("write", error)
        else:
            notes = file.health.worked("write")
        for text, level in [*notes, *file.appender.take_notes()]:
            self._tell(text, level)


class _Watched:
    """A file, and what was told of its failures."""

    def __init__(self, appender: ResilientAppender, name: str) -> None:
        self.appender = appender
        self.health = Health(name, "training goes on, and its lines wait until there is room")
