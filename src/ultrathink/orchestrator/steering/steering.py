"""Connects the policy to the trainer: requests, records and follows up its decisions.

It runs on the first process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from ultrathink.config.orchestrator import OrchestratorConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.protocols import State
from ultrathink.monitoring.depth import DepthStatistics
from ultrathink.monitoring.experts import ExpertStatistics
from ultrathink.monitoring.records import Reporter, RunInfo
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.live import LiveWatch, step_signals
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.steering.outliers import OutlierFilter
from ultrathink.orchestrator.steering.policy import Policy
from ultrathink.orchestrator.steering.proposals import (
    SKIP_BATCH,
    SOFT,
    Proposal,
    confidence_of,
    line_of,
)
from ultrathink.orchestrator.steering.rules import LOSS_KINDS, WEIGHT_KINDS, Situation
from ultrathink.orchestrator.steering.safety_net import BEST, SafetyNet
from ultrathink.orchestrator.steering.snapshots import SnapshotRing
from ultrathink.runs.decisions import ROLLBACK, Decision
from ultrathink.training.callbacks import Callback, Controller, StepReport, ValidationReport
from ultrathink.training.change import Change
from ultrathink.training.changes import AverageSnapshots, Rollback, Stop
from ultrathink.training.control import ControlQueue, TrainerControl
from ultrathink.training.endings import Ending
from ultrathink.training.records import ChangeRecord
from ultrathink.training.run_log import RunLog
from ultrathink.training.settings import LiveSettings
from ultrathink.training.silent_changes import KeepState, ScoreHeldOut
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.validation import Scores

FOLLOWED_FOR = 64  # steps after which the outcome of a decision is recorded
_RECENT = 10
_TROUBLE = (*LOSS_KINDS, *WEIGHT_KINDS, "non_finite", "lr_off_schedule", "overfitting")


class Steering(Remembers, Controller):
    """Decides with its policy, from the events of ``watch`` and ``outliers``, and records it.

    ``log`` writes decisions to ``decisions.jsonl``, ``show(step, title, text)`` shows them. They
    survive a rollback, and are part of checkpoints. ``most_snapshots(before)`` is the number of
    snapshots that fit into memory, if the resumed run had ``before``; ``best_checkpoint()`` is the
    step of the best one.
    """

    remembered = (
        "policy",
        "decisions",
        "_followed",
        "_num_skipped",
        "_non_finite",
        "_since_rollback",
    )
    records: ClassVar[Mapping[str, type]] = {"decisions": Decision}

    def __init__(
        self,
        config: OrchestratorConfig,
        *,
        watch: LiveWatch,
        outliers: OutlierFilter,
        settings: LiveSettings,
        position: Callable[[], int],
        most_snapshots: Callable[[int | None], int],
        is_compiled: bool,
        has_held_out: bool,
        best_checkpoint: Callable[[], int | None],
        log: RunLog,
        show: Callable[[int, str, str], None],
        report: Reporter,
    ) -> None:
        self.config = config
        self.watch = watch
        self.outliers = outliers
        self.policy = Policy(config.rules, config.limits, has_held_out=has_held_out)
        self.decisions: list[Decision] = []
        self.observer = _Observer(self)
        self.snapshots: SnapshotRing | None = None
        self._ring_state: State | None = None  # of a checkpoint, until the first boundary
        self._settings = settings
        self._position = position
        self._most_snapshots = most_snapshots
        self._is_compiled = is_compiled
        self._best_checkpoint = best_checkpoint
        self._log = log
        self._show = show
        self._report = report
        self._step = 0
        self._open: Decision | None = None  # being applied, and not yet written
        self._followed: list[int] = []  # numbers of decisions without an outcome yet
        self._num_skipped = 0  # skipped steps of the current incident
        self._non_finite = 0
        self._since_rollback: int | None = None
        self._is_new_best = False
        self._has_failed = False
        self._last_report: StepReport | None = None

    # -- a step boundary -----------------------------------------------------------------------

    def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
        """Request what the policy decides after this step."""
        self._attempt(partial(self._steer, report), control)

    def at_end(self, control: TrainerControl) -> None:
        """Return to the best weights of the run, if the last ones are worse."""
        self._attempt(self._conclude, control)

    def _attempt(self, act: Callable[[ControlQueue], None], control: TrainerControl) -> None:
        if self._has_failed:
            return
        assert isinstance(control, ControlQueue)
        try:
            if self.snapshots is None:
                self.snapshots = self._begin_ring(control)
            act(control)
        except Exception as error:
            self._has_failed = True
            self._report(
                f"the orchestrator failed at step {self._step} and is off; training continues: "
                f"{type(error).__name__}: {error}",
                "warning",
            )

    def _steer(self, report: StepReport, control: ControlQueue) -> None:
        assert self.snapshots is not None
        self._last_report = report
        events = self.watch.take_events()
        self._count(report)
        self._note_skips(report, control)
        self._follow_up(events)
        now = self._situation(report, events, self.snapshots)
        proposal = self.policy.decide(now)
        for rule, (resolved, text) in self.policy.take_outcomes().items():
            self._close(rule, {"resolved": resolved, "text": text})
        self._note_review()
        if proposal is not None:
            number = self._apply(proposal, control)
            if self.policy.net.begin(proposal, number, now):
                control.request(ScoreHeldOut(), "")
        elif self.policy.busy is None and self.policy.net.wants_score(self._step):
            control.request(ScoreHeldOut(), "")
        elif not (self.outliers.streak or self._non_finite or control.is_requested(Rollback)):
            self._take_snapshot(self.snapshots)
        self.policy.net.hold_best(self.snapshots, self._step, self._position())
        self._is_new_best = False

    def _conclude(self, control: ControlQueue) -> None:
        assert self.snapshots is not None
        net = self.policy.net
        step = net.better_step(self._step) if self.config.limits.rollbacks else None
        if step is None:
            return
        kept = self.snapshots.held.get(BEST)
        if kept is not None and kept.step == step:
            self._apply(net.returning(kept.snapshot), control)
        elif net.has_text and self._best_checkpoint() == step:
            self._apply(net.returning(control.recall(step)), control)
        else:
            self._report(f"the best weights, of step {step:,}, were not kept", "warning")

    def _begin_ring(self, control: ControlQueue) -> SnapshotRing:
        """The snapshots of a resumed run, or an empty ring."""
        rule = self.config.snapshots
        before: dict[str, Any] = dict(self._ring_state or {})
        most = self._most_snapshots(before.get("most"))
        if not most:
            self._report("there is no memory for snapshots: the run cannot roll back", "warning")
        ring = SnapshotRing(
            partial(control.snapshot, in_checkpoints=rule.in_checkpoints),
            every=rule.every_steps,
            most=most,
        )
        if before:
            ring.load_state_dict(before, control.brought_back)
        return ring

    def _take_snapshot(self, snapshots: SnapshotRing) -> None:
        is_due = snapshots.is_due(self._step)
        is_best = self._is_new_best or (is_due and self.policy.net.is_best_level(self._step))
        if is_best or is_due:
            loss = self.outliers.loss_level
            snapshots.take(self._position(), is_best=is_best, loss=loss)

    def _situation(
        self, report: StepReport, events: Sequence[Event], snapshots: SnapshotRing
    ) -> Situation:
        return Situation(
            step=report.step,
            values=step_signals(report).values,
            events=events,
            outliers=self.outliers,
            non_finite=self._non_finite,
            snapshots=snapshots,
            decisions=self.decisions,
            settings=self._settings,
            limits=self.config.limits,
            since_rollback=self._since_rollback,
            rollbacks_left=self.config.limits.rollbacks - self.policy.num_rollbacks,
            samples=self._position(),
            total_steps=self.watch.watcher.total_steps or 0,
            experts=report.experts,
            memory_share=report.memory_share,
            is_compiled=self._is_compiled,
        )

    def _count(self, report: StepReport) -> None:
        is_finite = math.isfinite(report.loss) and math.isfinite(report.grad_norm)
        self._non_finite = 0 if is_finite else self._non_finite + 1
        if self._since_rollback is not None and not report.skipped:
            self._since_rollback += 1

    # -- decisions -----------------------------------------------------------------------------

    def _apply(self, proposal: Proposal, control: ControlQueue) -> int:
        self._open = self._decision(proposal)
        number = len(self.decisions)
        self._keep_states(proposal.changes, control)
        with control.deciding(number):
            for change in proposal.changes:
                control.request(change, f"decision {number}, {proposal.rule}")
        return number

    def _keep_states(self, changes: Sequence[Change], control: TrainerControl) -> None:
        """Request to write the states that an audit of the last decision needs: the current one
        and those of the snapshots used."""
        number, most = len(self.decisions), self.config.kept_states
        if not most or (changes and not any(change.is_felt for change in changes)):
            return
        averaged: dict[int, bool] = {}  # by key: whether only the weights are needed
        for change in changes:
            for one in change.needed:
                is_average = isinstance(change, AverageSnapshots)
                averaged[one.key] = averaged.get(one.key, True) and is_average
        for key, weights_only in averaged.items():
            control.request(KeepState(number, most, key, weights_only), "")
        control.request(KeepState(number, most), "")

    def _went_back(self, change: Rollback) -> None:
        if self.snapshots is not None:
            self.snapshots.go_back_to(change.snapshot)
            self.policy.net.went_back(change.snapshot.step, self.snapshots)
        self._since_rollback, self._non_finite = 0, 0
        if self._num_skipped:
            text = f"{self._num_skipped} batches were skipped, and the problem remained"
            self._num_skipped = 0
            self._close("skip_outliers", {"resolved": False, "text": text})

    def _decision(self, proposal: Proposal) -> Decision:
        decision = Decision(
            id=len(self.decisions) + 1,
            step=self._step,
            rule=proposal.rule,
            level=proposal.level,
            confidence=proposal.confidence,
            signals={name: float(value) for name, value in proposal.signals.items()},
            action=proposal.changes[0].setting if proposal.changes else SKIP_BATCH,
            before=None,
            after=None,
            reasoning=proposal.reasoning,
        )
        self.decisions.append(decision)
        self._followed.append(len(self.decisions))
        return decision

    def note_change(self, record: ChangeRecord) -> None:
        """Note an applied change in the record of its decision, if it has one."""
        if isinstance(record.change, Rollback):
            self._went_back(record.change)
        decision = self._open
        if decision is None or record.decision != decision.id:
            return
        if isinstance(record.change, Change):
            decision.changes.append(record.change.as_applied(record.after).to_json())
        if decision.before is None and decision.after is None:
            decision.before, decision.after = record.before, record.after
        else:
            more = {"action": record.setting, "before": record.before, "after": record.after}
            decision.also.append(more)
        if isinstance(record.change, Stop):
            self.flush()  # no further step will do it

    def note_validation(self, report: ValidationReport) -> None:
        self._is_new_best = report.is_best
        self.policy.net.note_validation(report.step, report.loss, report.is_best)

    def note_step(self, step: int) -> None:
        """Note a step, after which all of the last decision is applied."""
        self._step = step
        self.flush()

    def flush(self) -> None:
        """Write the last decision, once all of it is applied."""
        if self._open is not None:
            decision, self._open = self._open, None
            self._show(decision.step, decision.rule, line_of(decision))
            self._log.write_decision(decision)

    def restore_records(self, step: int) -> None:
        """Write again the decisions that a resume at ``step`` cut, made before a rollback."""
        self._step = step
        for decision in self.decisions:
            if decision.step >= step:  # that of this step may not be written yet
                self._log.write_decision(decision)

    def finish(self) -> None:
        self.flush()
        if self.decisions:
            self._log.fold_decisions()

    # -- what came of them ---------------------------------------------------------------------

    def _note_skips(self, report: StepReport, control: TrainerControl) -> None:
        """Record consecutive batches that the guard skipped as one decision."""
        seen = self.outliers.last
        if self.outliers.streak and seen is not None:
            if self._num_skipped == 0:
                self._open = self._decision(
                    Proposal(
                        "skip_outliers",
                        SOFT,
                        confidence_of(seen.score),
                        (),
                        f"A loss of {seen.loss:.4g} and a gradient norm of {seen.norm:.3g} are "
                        f"unlike the steps before ({seen.loss_level:.4g}, {seen.norm_level:.3g}).",
                        seen.values(),
                        report.step,
                    )
                )
                self.flush()
                self._keep_states((), control)
            self._num_skipped += 1
        elif self._num_skipped:
            count, self._num_skipped = self._num_skipped, 0
            text = f"{count} batch{'es were' if count > 1 else ' was'} skipped, then it was over"
            self._close("skip_outliers", {"resolved": True, "skipped": count, "text": text})

    def _follow_up(self, events: Sequence[Event]) -> None:
        alarms = [one for one in events if one.is_alarm and one.kind in _TROUBLE]
        for number in list(self._followed):
            decision = self.decisions[number - 1]
            if decision.rule in ("skip_outliers", self.policy.busy):
                continue  # these rules report the outcome themselves
            went_back = decision.action == ROLLBACK and decision.after is not None
            begun = decision.after if went_back else decision.step
            until = begun + FOLLOWED_FOR
            if went_back:  # the step of the problem must have been passed
                until = max(until, decision.before + FOLLOWED_FOR // 4)
            if alarms and self._step > begun:
                text = f"another alarm at step {self._step:,}: {alarms[0].message}"
                self._settle(number, {"resolved": False, "text": text})
            elif self._step >= until:
                text = f"no alarm for {self._step - begun} steps"
                self._settle(number, {"resolved": True, "text": text})

    def _note_review(self) -> None:
        """Add the result of a review to the outcomes of its decisions."""
        result, self.policy.net.result = self.policy.net.result, None
        for number in result.decisions if result is not None else ():
            assert result is not None
            known = self.decisions[number - 1].outcome or {"resolved": True}
            text = "; ".join(filter(None, (known.get("text"), result.text)))
            is_good = known["resolved"] and result.is_good
            self._settle(number, {**known, "resolved": is_good, "text": text})

    def _close(self, rule: str, outcome: dict[str, Any]) -> None:
        for number in list(self._followed):
            if self.decisions[number - 1].rule == rule:
                self._settle(number, outcome)

    def _settle(self, number: int, outcome: dict[str, Any]) -> None:
        decision = self.decisions[number - 1]
        decision.outcome = {**outcome, "step": self._step}
        if number in self._followed:
            self._followed.remove(number)
        self._log.write_decision(decision)

    # -- for people ----------------------------------------------------------------------------

    def best_snapshot(self, last_steps: int) -> Snapshot:
        """The snapshot of the last steps with the lowest training loss.

        Raises UltrathinkError if there is none.
        """
        steps = self.snapshots.steps if self.snapshots is not None else []
        now = self._step
        kept = self.snapshots.best_since(now - last_steps) if self.snapshots is not None else None
        if kept is None:
            there = f"those of steps {', '.join(map(str, steps))} are" if steps else "none is"
            raise UltrathinkError(
                f"there is no snapshot of the last {last_steps} steps before step "
                f"{now}; {there} kept (orchestrator.mode=act keeps some)."
            )
        return kept.snapshot

    def get_current_metrics(self) -> dict[str, float]:
        """The signals of the last step, under the names of ``Signals``."""
        return {} if self._last_report is None else dict(step_signals(self._last_report).values)

    def get_expert_statistics(self) -> ExpertStatistics | None:
        """The statistics of experts in the last step, if it was logged and the model has any."""
        return self._last_report.experts if self._last_report is not None else None

    def get_mod_statistics(self) -> DepthStatistics | None:
        """The statistics of depth routing in the last step, if it was logged and there is any."""
        return self._last_report.depth if self._last_report is not None else None

    def throughput(self) -> float:
        """Trained tokens per second in the last step."""
        report = self._last_report
        return report.num_tokens / report.seconds if report is not None and report.seconds else 0.0

    def get_adaptive_status(self) -> dict[str, Any]:
        """The decisions so far and their outcomes."""
        outcomes = [one.outcome for one in self.decisions if one.outcome is not None]
        return {
            "monitoring_active": not self._has_failed,
            "adaptive_decisions_made": len(self.decisions),
            "recent_decisions": [one.to_json() for one in self.decisions[-_RECENT:]],
            "anomalies_found": len([one for one in self.watch.watcher.events if one.is_alarm]),
            "anomalies_resolved": sum(bool(one.get("resolved")) for one in outcomes),
            "rollbacks": self.policy.num_rollbacks,
            "forecast_error": self.watch.watcher.forecast_error,
            "phase": self.watch.watcher.phase,
        }

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """The state to keep in checkpoints, with the snapshots embedded in one made now."""
        ring = self._ring_state
        if self.snapshots is not None and self.config.snapshots.in_checkpoints:
            ring = self.snapshots.state_dict()
        return {**super().state_dict(), "snapshots": ring}

    def load_state_dict(self, state: State) -> None:
        values: dict[str, Any] = dict(state)
        super().load_state_dict(state)
        self._ring_state = values["snapshots"]

    def roll_back(self, state: State) -> None:
        """Roll back to ``state``, but keep the decisions."""
        values: dict[str, Any] = dict(state)
        self.policy.net.roll_back(values["policy"]["rules"][SafetyNet.name])


class _Observer(Callback):
    """Passes the events of the run to ``steering``."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering

    def on_start(self, info: RunInfo) -> None:
        self._steering.restore_records(info.start_step)

    def on_step(self, report: StepReport) -> None:
        self._steering.note_step(report.step)

    def on_validation(self, report: ValidationReport) -> None:
        self._steering.note_validation(report)

    def on_scored(self, scores: Scores) -> None:
        self._steering.policy.net.note_scores(scores.loss, list(scores.batch_losses))

    def on_change(self, change: ChangeRecord) -> None:
        self._steering.note_change(change)

    def on_end(self, ending: Ending | None) -> None:
        self._steering.finish()
