"""Connects the watcher to the trainer: reports become signals, events are reported and written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence

from ultrathink.core.protocols import State
from ultrathink.monitoring.appending import ResilientAppender
from ultrathink.monitoring.experts import ExpertRecord, figures_of
from ultrathink.monitoring.records import Reporter, RunInfo
from ultrathink.orchestrator.detectors import DETECTORS
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.watcher import Watcher
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, EvaluationReport, StepReport, ValidationReport
from ultrathink.training.endings import Ending
from ultrathink.training.memory import memory_in_use
from ultrathink.training.run_log import WatchedFile


class LiveWatch(Callback):
    """Watches a run while it trains: reports alarms, and writes all events to ``events.jsonl``.

    It never changes the run. ``show_phase`` is called with each new phase. ``without`` names the
    classes of detectors that do not apply.
    """

    def __init__(
        self,
        run: RunFolder,
        report: Reporter,
        show_phase: Callable[[str], None] = lambda phase: None,
        *,
        without: Collection[str] = (),
    ) -> None:
        self.run = run
        self.watcher = Watcher(
            detectors=[make() for make in DETECTORS if make.__name__ not in without]
        )
        self._report = report
        self._show_phase = show_phase
        self._shown = ""  # the phase that was shown last
        self._fresh: list[Event] = []  # since ``take_events``
        self._file = WatchedFile(run.events, run.events.name, report)

    def on_start(self, info: RunInfo) -> None:
        self._file.resume(info.start_step)

    def on_budget(self, total_steps: int) -> None:
        self.watcher.total_steps = total_steps

    def on_step(self, report: StepReport) -> None:
        self._keep(report.step, self.watcher.observe(step_signals(report)))
        phase = self.watcher.phase
        if phase is not None and phase != self._shown:
            self._shown = phase
            self._show_phase(phase)
        self._file.retry()

    def on_validation(self, report: ValidationReport) -> None:
        values = {"val_loss": report.loss}
        if "token_accuracy" in report.figures:
            values["val_accuracy"] = report.figures["token_accuracy"]
        self._keep(report.step, self.watcher.observe(Signals(report.step, values)))

    def on_evaluation(self, report: EvaluationReport) -> None:
        values = {f"eval/{name}": value for name, value in report.figures.items()}
        self._keep(report.step, self.watcher.observe(Signals(report.step, values)))

    def on_end(self, ending: Ending | None) -> None:
        self._file.do(ResilientAppender.close)

    def state_dict(self) -> State:
        return self.watcher.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.watcher.load_state_dict(state)

    def take_events(self) -> list[Event]:
        """The events that are new or more severe since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def _keep(self, step: int, events: Sequence[Event]) -> None:
        self._fresh += events
        for event in events:
            # A resume cuts the file by `step`; `began` is the step of the event.
            record = {**event.to_json(), "step": step, "began": event.step, "time": time.time()}
            self._file.write(json.dumps(record, ensure_ascii=False))
            if event.is_alarm:
                self._report(described(event), "warning")


def described(event: Event) -> str:
    """An event as a line for the console."""
    return f"{event.kind} at step {event.step:,} ({event.severity}): {event.message}"


def step_signals(report: StepReport) -> Signals:
    """The figures of a step's report, under standard names."""
    values: dict[str, float] = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        **({} if report.scheduled_lr is None else {"lr_scheduled": report.scheduled_lr}),
        "step_time": report.seconds,
        "data_wait": report.data_wait,
        "skipped_steps": report.num_skipped,
        **memory_in_use(),
        **report.norms,
    }
    if report.skipped and report.num_tokens == 0:
        values.pop("loss")  # with nothing to learn there is no loss, rather than zero
        values.pop("grad_norm")
    if report.skipped:
        values.pop("lr_scheduled", None)  # no rate was used
    if report.experts is not None and report.experts.warmup >= 1 and report.experts.num_tokens:
        values |= figures_of(ExpertRecord(report.step, 0.0, report.experts).to_json())
    if report.depth is not None and report.depth.num_tokens:
        values |= report.depth.metrics()
    return Signals(report.step, values)
