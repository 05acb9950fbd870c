"""The rules of the policy: which intervention follows from which evidence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ultrathink.config.orchestrator import LimitsConfig
from ultrathink.monitoring.experts import ExpertStatistics
from ultrathink.orchestrator.detectors.trend import FAR_OFF, OFF
from ultrathink.orchestrator.events import Event, is_alarm
from ultrathink.orchestrator.steering.outliers import OutlierFilter
from ultrathink.orchestrator.steering.proposals import (
    CRITICAL,
    HARD,
    Proposal,
    confidence_after,
    confidence_of,
)
from ultrathink.orchestrator.steering.snapshots import SnapshotRing
from ultrathink.runs.decisions import Decision
from ultrathink.training.change import Change
from ultrathink.training.changes import (
    AverageSnapshots,
    CorrectLearningRate,
    Rollback,
    SetLearningRateFactor,
    Stop,
)

if TYPE_CHECKING:
    from ultrathink.training.settings import LiveSettings

NON_FINITE = 3  # steps in a row: the weights are NaN or infinite
SKIPPED = 8  # steps in a row: more than a single bad batch
MARGIN = 2  # steps before a problem shows, its cause may already be in the weights
SAME_TROUBLE = 150  # steps after a rollback in which a problem counts as the same one
ATTEMPTS = 3
JUDGED_AFTER = 100  # steps, enough to see whether the run improves
GENTLER = 0.5  # factor of the rate, if a rollback did not help
EASES_OVER = 200
AVERAGED = 3  # snapshots before the best
LOSS_KINDS = ("loss_spike", "divergence", "gradient_explosion")
DEAD = "dead_expert"
WEIGHT_KINDS = ("expert_collapse", "expert_imbalance", DEAD, "layer_vanishing")
# Dead experts are reported at most 300 steps after they died: if that happens this soon after a
# rollback for dead experts, the rollback did not help.
STILL_DEAD = 600


@dataclass(frozen=True)
class Situation:
    """The information available to the rules at a step boundary."""

    step: int
    values: Mapping[str, float]  # of this step, under the names of ``Signals``
    events: Sequence[Event]  # new or more severe at this step
    outliers: OutlierFilter
    non_finite: int  # steps in a row whose loss or norm was NaN or infinite
    snapshots: SnapshotRing
    decisions: Sequence[Decision]
    settings: LiveSettings
    limits: LimitsConfig
    since_rollback: int | None  # updates since the last one; None before the first
    rollbacks_left: int
    samples: int  # taken or skipped since the run began
    total_steps: int  # of the run; 0 while unknown
    experts: ExpertStatistics | None = None  # of this step, if it was logged
    memory_share: float = 0.0  # in use, the largest of all processes
    is_compiled: bool = False


class Rule(ABC):
    """Proposes one kind of intervention; after a decision it pauses for ``cool_down`` steps."""

    name: ClassVar[str]
    cool_down: ClassVar[int] = 8
    outcome: tuple[bool, str] | None = None  # whether its last decision was right, once it knows

    def is_busy(self, now: Situation) -> bool:
        """Whether no other rule may act at this boundary."""
        return False

    @abstractmethod
    def propose(self, now: Situation) -> Proposal | None:
        """The proposal at this boundary, if any."""


class CorrectRate(Rule):
    """If the optimizer's rate is not the scheduled one, correct it, and undo the steps that were
    too large."""

    name = "correct_rate"
    cool_down = 0

    def propose(self, now: Situation) -> Proposal | None:
        rate, scheduled = now.values.get("lr"), now.values.get("lr_scheduled")
        if not rate or not scheduled or rate < 0 or scheduled < 0:
            return None
        off = math.log(rate / scheduled)
        if abs(off) < OFF:
            return None
        most = now.limits.lr_correction
        factor = min(most, max(1 / most, now.settings.lr_correction * scheduled / rate))
        if math.isclose(factor, now.settings.lr_correction, rel_tol=1e-6):
            return None
        changes: list[Change] = [CorrectLearningRate(factor)]
        reasoning = (
            f"The optimizer used a rate of {rate:.3g}, {rate / scheduled:.3g} times the scheduled "
            f"{scheduled:.3g}."
        )
        kept = now.snapshots.before(now.step - 1)
        if off >= FAR_OFF and kept is not None:
            changes.insert(0, Rollback(kept.snapshot, skip_data=False))
            reasoning += f" The steps since {kept.step:,} are repeated."
        figures = {"lr": rate, "lr_scheduled": scheduled, "ratio": rate / scheduled}
        return Proposal(self.name, HARD, 1.0, tuple(changes), reasoning, figures, now.step)


@dataclass(frozen=True)
class _Trouble:
    began: int
    level: int
    confidence: float
    text: str
    values: Mapping[str, float]
    is_of_loss: bool = True
    may_be_data: bool = False
    is_below: bool = False  # suspiciously low losses, which may be normal for the following data


class RollBack(Rule):
    """If the weights or the router are damaged, roll back to before that.

    If a rollback has not helped, the rate is lowered too, and then an older snapshot is used.
    """

    name = "roll_back"

    def propose(self, now: Situation) -> Proposal | None:
        trouble = self._trouble(now)
        if trouble is None:
            return None
        attempt, before = self._attempt(now), trouble.began - MARGIN
        if attempt >= (1 if trouble.is_below else ATTEMPTS):
            return None
        if attempt and trouble.may_be_data and not now.since_rollback:
            # The weights are those of the snapshot: they or the data are bad. Go further, once.
            if max(now.outliers.streak, now.non_finite) < 3 * SKIPPED or attempt > 1:
                return None
            tried = [one.after for one in now.decisions if one.rule == self.name]
            before = min(before, tried[-1] - 1) if tried[-1] is not None else before
        elif attempt > 1:
            before = min(before, min(now.snapshots.steps, default=before))
        kept = now.snapshots.before(before)
        if kept is None:
            return self._without_snapshot(now, trouble)
        changes: list[Change] = [Rollback(kept.snapshot)]
        reasoning = f"{trouble.text}; step {kept.step:,} is the last one before that."
        if attempt and trouble.is_of_loss and not trouble.may_be_data:
            factor = _within(now, GENTLER**attempt)
            changes.append(SetLearningRateFactor(factor, EASES_OVER))
            reasoning += f" The last rollback did not help: the rate is multiplied by {factor:g}."
        return self._proposal(trouble, changes, reasoning)

    def _trouble(self, now: Situation) -> _Trouble | None:
        if now.non_finite >= NON_FINITE and now.non_finite % NON_FINITE == 0:
            return _Trouble(
                now.step - now.non_finite + 1,
                CRITICAL,
                confidence_after(now.non_finite),
                f"{now.non_finite} steps in a row were NaN or infinite",
                {"non_finite_steps": now.non_finite},
                may_be_data=True,
            )
        streak, seen = now.outliers.streak, now.outliers.last
        if streak >= SKIPPED and streak % SKIPPED == 0 and seen is not None:
            return _Trouble(
                now.step - streak + 1,
                HARD,
                confidence_of(seen.score),
                f"{streak} steps in a row were skipped, the last with a loss of {seen.loss:.4g} "
                f"(usually {seen.loss_level:.4g})",
                seen.values(),
                may_be_data=True,
                is_below=seen.loss_score < 0 and seen.norm_score < seen.score,
            )
        if streak or now.non_finite:
            return None  # already handled
        events = [e for e in now.events if e.kind != DEAD or not self._has_gone_back_for_dead(now)]
        return next((found for e in events if (found := self._of_event(e)) is not None), None)

    def _has_gone_back_for_dead(self, now: Situation) -> bool:
        return any(
            one.rule == self.name
            and one.signals.get("dead", 0) > 0
            and one.after is not None
            and now.step - one.after <= STILL_DEAD
            for one in now.decisions
        )

    def _of_event(self, event: Event) -> _Trouble | None:
        if not is_alarm(event.severity):
            return None
        is_loss = event.kind in LOSS_KINDS
        if not is_loss and event.kind not in WEIGHT_KINDS:
            return None
        if event.kind == "gradient_explosion" and event.severity == "medium":
            return None  # the guard handles a single large gradient
        score = event.values.get("score")
        sure = confidence_after(8) if score is None else confidence_of(score)
        text = event.message[0].upper() + event.message[1:]
        return _Trouble(event.step, HARD, sure, text, event.values, is_of_loss=is_loss)

    def _attempt(self, now: Situation) -> int:
        begun = [one.before for one in now.decisions if one.rule == self.name and one.before]
        if now.since_rollback is None or not begun:
            return 0
        # After a long rollback the steps up to the problem are repeated first.
        if now.since_rollback > SAME_TROUBLE and now.step > begun[-1] + SAME_TROUBLE:
            return 0
        count = 0
        for decision in reversed(now.decisions):
            if decision.rule == self.name:
                count += 1
                outcome = decision.outcome
                if outcome is not None and outcome.get("resolved"):
                    return count - 1
        return count

    def _without_snapshot(self, now: Situation, trouble: _Trouble) -> Proposal | None:
        if not trouble.is_of_loss or trouble.may_be_data:
            return None
        lower = SetLearningRateFactor(_within(now, 0.1), EASES_OVER)
        text = f"{trouble.text}; no snapshot is old enough for a rollback."
        return self._proposal(trouble, [lower], text)

    def _proposal(self, trouble: _Trouble, changes: list[Change], reasoning: str) -> Proposal:
        what = (self.name, trouble.level, trouble.confidence, tuple(changes), reasoning)
        return Proposal(*what, trouble.values, trouble.began, JUDGED_AFTER)


def _within(now: Situation, factor: float) -> float:
    """The allowed factor of the rate that is nearest to ``factor``."""
    low, high = (limit / now.settings.lr_scale for limit in now.limits.lr_factor)
    return min(high, max(low, factor))


class StopOverfitting(Rule):
    """If the held-out loss rises far above its best, end the run with the best weights.

    Their rate was never lowered, as at the end of a schedule; averaging them with earlier weights
    has part of that effect.
    """

    name = "stop_overfitting"

    def propose(self, now: Situation) -> Proposal | None:
        if not now.limits.may_stop:
            return None
        for event in now.events:
            best = now.snapshots.best
            if event.kind != "overfitting" or event.severity not in ("high", "critical"):
                continue
            if best is None or best.step >= event.step + 1:
                continue
            rise, noise = event.values.get("rise", 0.0), event.values.get("noise", math.inf)
            sure = confidence_of(rise / noise if noise > 0 else math.inf)
            text = event.message[0].upper() + event.message[1:]
            older = [one.snapshot for one in now.snapshots.older_than(best.step)[-AVERAGED:]]
            averaging = (AverageSnapshots(older),) if older else ()
            return Proposal(
                self.name,
                HARD,
                sure,
                (Rollback(best.snapshot), *averaging, Stop()),
                f"{text}; the run ends with the best weights, of step {best.step:,}, "
                f"averaged with earlier ones if that is better.",
                event.values,
                event.step,
            )
        return None
