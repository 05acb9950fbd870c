"""Writes every change, message and checkpoint of a run to its log files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ultrathink.monitoring.appending import ResilientAppender
from ultrathink.monitoring.health import Health
from ultrathink.monitoring.jsonl import line_appender
from ultrathink.monitoring.records import Level, Reporter, RunInfo
from ultrathink.runs.decisions import BY_HAND, Decision, fold_decisions
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.endings import Ending
from ultrathink.training.records import ChangeRecord


class RunLog(Callback):
    """Appends changes to ``decisions.jsonl``, messages and checkpoints to ``logs/run.log``.

    Lines that cannot be written wait until they can. That is reported through ``report``, by
    default to the log only.
    """

    def __init__(self, run: RunFolder, report: Reporter | None = None) -> None:
        self.run = run
        report = report or self.on_message
        self._log = WatchedFile(run.logs / "run.log", "logs/run.log", report)
        self._decisions = WatchedFile(run.decisions, run.decisions.name, report)

    def on_start(self, info: RunInfo) -> None:
        self._decisions.resume(info.start_step)
        self.on_message(f"training starts after step {info.start_step}", "info")

    def on_step(self, report: StepReport) -> None:
        for file in (self._log, self._decisions):
            file.retry()

    def on_change(self, change: ChangeRecord) -> None:
        if change.decision is None:  # the orchestrator writes its own decisions
            self.write_decision(_decision(change))

    def write_decision(self, decision: Decision) -> None:
        """Append ``decision`` to ``decisions.jsonl``; it replaces earlier ones of its number."""
        self._decisions.write(json.dumps(decision.to_json(), ensure_ascii=False))

    def fold_decisions(self) -> None:
        """At the end of the run, keep only the last record of each decision."""
        self._decisions.do(lambda _: fold_decisions(self.run.decisions))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.on_message(f"checkpoint of step {step} written", "info")

    def on_message(self, text: str, level: Level) -> None:
        self._log.write(_line(text, level))

    def on_end(self, ending: Ending | None) -> None:
        for file in (self._decisions, self._log):
            file.do(ResilientAppender.close)


def _decision(change: ChangeRecord) -> Decision:
    """The record of a change that the policy did not decide."""
    is_by_hand = change.rule == BY_HAND
    return Decision(
        id=None,
        step=change.step,
        rule=change.rule,
        level=None if is_by_hand else 4,  # the run could not continue without it
        confidence=None if is_by_hand else 1.0,
        signals={},
        action=change.setting,
        before=change.before,
        after=change.after,
        reasoning=change.reason,
    )


def _line(text: str, level: Level) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {level}: {text}"


class WatchedFile:
    """A file of lines that survives write failures, each kind reported once by ``report``."""

    def __init__(self, path: Path, name: str, report: Reporter) -> None:
        self._path, self._report = path, report
        self._appender = line_appender(path)
        self._health = Health(name, "training continues, and its lines wait until there is room")

    def resume(self, step: int) -> None:
        """Drop the lines of later steps, which a run that resumes repeats."""
        if step:
            self._appender = line_appender(self._path, cut_beyond=step)
            self.do(ResilientAppender.flush)

    def write(self, line: str) -> None:
        """Append ``line``."""
        entry = f"{line}\n".encode(errors="backslashreplace")
        self.do(lambda appender: appender.append(entry))

    def retry(self) -> None:
        """Write the lines that wait, if there is room now."""
        if self._appender.is_waiting:
            self.do(ResilientAppender.flush)

    def do(self, action: Callable[[ResilientAppender], None]) -> None:
        """Run ``action`` on the file."""
        try:
            action(self._appender)
        except OSError as error:
            notes = self._health.failed("write", error)
        else:
            notes = self._health.worked("write")
        for text, level in (*notes, *self._appender.take_notes()):
            self._report(text, level)


class RankLog(Callback):
    """Writes the messages of a process other than the first to ``logs/rank-N.log``."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        name = f"rank-{rank}.log"
        self._log = WatchedFile(run.logs / name, f"logs/{name}", lambda text, level: None)

    def on_message(self, text: str, level: Level) -> None:
        self._log.write(_line(text, level))

    def on_change(self, change: ChangeRecord) -> None:
        self.on_message(f"{change.setting}: {change.before} -> {change.after}", "info")

    def on_end(self, ending: Ending | None) -> None:
        self.on_message(f"ended: {ending or 'an exception'}", "info")
        self._log.do(ResilientAppender.close)
