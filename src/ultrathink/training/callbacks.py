"""Observers and controllers of a run.

The order of events in a run, which is the training loop seen from outside::

    start          (the length is known only if it was given in steps)
    budget         (the length in steps)
      for each step:
        step
        validation   (when due)
        evaluation   (when an evaluator is due)
        Controller.at_boundary
        change       (for each request of a controller that took effect)
    validation     (of the last step)
    Controller.at_end
    change, validation   (if that rolls the run back)
    evaluation     (by evaluators that have not seen the last step)
    end

A checkpoint is taken at the end of a step boundary, so that it includes all of it; ``checkpoint``
follows once it is written, some steps later. A ``message`` may come at any time, even within
another event.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ultrathink.core.protocols import State
from ultrathink.monitoring.depth import DepthStatistics
from ultrathink.monitoring.experts import ExpertRecord, ExpertStatistics
from ultrathink.monitoring.records import Level, MetricRecord, Reporter, RunInfo, Sink
from ultrathink.monitoring.sink_group import SinkGroup
from ultrathink.training.control import TrainerControl
from ultrathink.training.endings import Ending
from ultrathink.training.memory import memory_in_use
from ultrathink.training.records import ChangeRecord
from ultrathink.training.validation import Scores


@dataclass(frozen=True)
class StepReport:
    """One optimizer step."""

    step: int
    loss: float  # mean cross-entropy over the step's trained tokens, nats
    aux_losses: dict[str, float]  # each as a mean over the step's trained tokens
    grad_norm: float  # before clipping
    lr: float  # as used by the optimizer
    num_tokens: int  # trained tokens of this step
    tokens: int  # positions seen since the run began
    seconds: float
    skipped: bool  # no update: not finite, or nothing to learn
    num_skipped: int  # such steps since the run began
    data_wait: float = 0.0  # part of ``seconds`` spent waiting for the batch
    timing: dict[str, float] = field(default_factory=dict)  # with several processes, now and then
    norms: dict[str, float] = field(default_factory=dict)  # by layer, in logged steps
    scheduled_lr: float | None = None  # by the schedule and the requested factors
    experts: ExpertStatistics | None = None  # of this step's tokens, in logged steps
    depth: DepthStatistics | None = None  # of this step's tokens, in logged steps
    memory_share: float = 0.0  # largest share in use on any process, at the last exchange


@dataclass(frozen=True)
class ValidationReport:
    """One pass over the held-out text."""

    step: int
    tokens: int  # positions trained on so far
    loss: float
    num_tokens: int  # positions validated on
    seconds: float
    is_best: bool
    figures: Mapping[str, float] = field(default_factory=dict)  # the objective's, by name


@dataclass(frozen=True)
class EvaluationReport:
    """The results of the evaluators that were due after a step."""

    step: int
    tokens: int  # positions trained on so far
    figures: Mapping[str, float]  # by NAME/figure
    seconds: float


class _Remembering:
    def state_dict(self) -> State:
        """The state to keep in checkpoints."""
        return {}

    def load_state_dict(self, state: State) -> None: ...

    def roll_back(self, state: State) -> None:
        """The run goes back to when ``state_dict`` returned ``state``."""
        self.load_state_dict(state)


class Callback(_Remembering):
    """Observes a run; nothing that its methods return or raise changes the training."""

    def on_start(self, info: RunInfo) -> None: ...

    def on_budget(self, total_steps: int) -> None: ...

    def on_step(self, report: StepReport) -> None: ...

    def on_validation(self, report: ValidationReport) -> None: ...

    def on_evaluation(self, report: EvaluationReport) -> None: ...

    def on_change(self, change: ChangeRecord) -> None: ...

    def on_scored(self, scores: Scores) -> None:
        """Held-out text was scored outside the regular validations."""

    def on_checkpoint(self, step: int, path: Path) -> None: ...

    def on_message(self, text: str, level: Level) -> None: ...

    def on_end(self, ending: Ending | None) -> None:
        """The run has ended; ``ending`` is None after an exception."""


class Controller(_Remembering):
    """Changes a run through ``TrainerControl``; called after every step."""

    def at_boundary(self, report: StepReport, control: TrainerControl) -> None: ...

    def at_end(self, control: TrainerControl) -> None:
        """The run has ended and is validated; requests are applied before the last checkpoint."""


def is_logged(step: int, log_every: int, total_steps: int) -> bool:
    """Whether ``step`` is logged: every ``log_every`` steps, the first and the last."""
    return step == 1 or step % log_every == 0 or step == total_steps


class MetricsCallback(Callback):
    """Turns reports into records and hands each to every sink.

    ``sinks`` takes everything else, such as samples. A sink that fails is reported through
    ``report``, by default to the other sinks only.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        log_every: int,
        flops_per_token: float,
        peak_flops: float,
        report: Reporter | None = None,
    ) -> None:
        self.sinks = SinkGroup(sinks, report)
        self.log_every = log_every
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._total_steps = 0
        self._tokens_at_last_record: int | None = None
        self._seconds_since_record = 0.0

    def on_start(self, info: RunInfo) -> None:
        self.sinks.open(info)

    def on_budget(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self.sinks.set_total_steps(total_steps)

    def on_step(self, report: StepReport) -> None:
        self._seconds_since_record += report.seconds
        if self._tokens_at_last_record is None:
            self._tokens_at_last_record = report.tokens - int(report.num_tokens)
        if is_logged(report.step, self.log_every, self._total_steps):
            self._write_step(report)
        self.sinks.progress(report.step)

    def on_validation(self, report: ValidationReport) -> None:
        values = {"loss": report.loss, "tokens": report.tokens, **report.figures}
        self.sinks.write(MetricRecord(report.step, "val", time.time(), values))

    def on_evaluation(self, report: EvaluationReport) -> None:
        values = {"tokens": report.tokens, **report.figures}
        self.sinks.write(MetricRecord(report.step, "eval", time.time(), values))

    def on_message(self, text: str, level: Level) -> None:
        self.sinks.message(text, level)

    def on_change(self, change: ChangeRecord) -> None:
        if change.setting == "rollback":  # tokens went back too: restart the measurement
            self._tokens_at_last_record, self._seconds_since_record = None, 0.0
        if change.decision is None:  # decisions are shown by the orchestrator
            text = f"{change.setting}: {change.before} -> {change.after} ({change.reason})"
            self.on_message(text, "info")

    def on_end(self, ending: Ending | None) -> None:
        self.sinks.close()

    def _write_step(self, report: StepReport) -> None:
        assert self._tokens_at_last_record is not None
        tokens = report.tokens - self._tokens_at_last_record
        rate = tokens / max(self._seconds_since_record, 1e-9)
        self._tokens_at_last_record, self._seconds_since_record = report.tokens, 0.0
        values = {
            "loss": report.loss,
            "tokens": report.tokens,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens_per_sec": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops,
            "memory_gib": memory_in_use()["memory"],
            "data_wait": report.data_wait,
            "skipped_steps": report.num_skipped,
            **report.aux_losses,
            **report.timing,
            **report.norms,
            **(report.experts.summary() if report.experts is not None else {}),
            **(report.depth.metrics() if report.depth is not None else {}),
        }
        now = time.time()
        self.sinks.write(MetricRecord(report.step, "train", now, values))
        if report.experts is not None:
            self.sinks.experts(ExpertRecord(report.step, now, report.experts))


class LastReports(Callback):
    """Keeps the last step report and validation report for the final summary."""

    def __init__(self) -> None:
        self.step: StepReport | None = None
        self.validation: ValidationReport | None = None

    def on_step(self, report: StepReport) -> None:
        self.step = report

    def on_validation(self, report: ValidationReport) -> None:
        self.validation = report
