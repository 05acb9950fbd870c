"""Undoes decisions that did not help, and lets a run end with its best weights.

A decision that is not an exact repair is judged some steps later: held-out text is scored right
after the decision and again then. Without held-out text the smoothed training loss is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ultrathink.orchestrator.events import is_alarm
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.signals import SMALL
from ultrathink.orchestrator.steering.proposals import HARD, SURE_ENOUGH, Proposal, confidence_of
from ultrathink.orchestrator.steering.rules import (
    LOSS_KINDS,
    SAME_TROUBLE,
    WEIGHT_KINDS,
    Rule,
    Situation,
)
from ultrathink.orchestrator.steering.snapshots import SnapshotRing
from ultrathink.orchestrator.windows import Window, deviation, median
from ultrathink.training.changes import Rollback, Stop
from ultrathink.training.snapshots import Snapshot

CLEARLY = 3.0  # standard errors, as required of a hard decision
LEAST = 0.01  # of the loss: a healthy run may be this much worse for a while
CRUDE = 0.02  # the same if the noise is unknown
FEWEST = 4  # batches or steps needed to estimate the noise
NO_NUMBER = 1e9  # replaces a loss of NaN or infinity
SMOOTHED = 16  # steps
MEDIAN = 1.2533  # standard error of a median, relative to that of a mean
BASELINE, BEST = "safety_net", "safety_net.best"  # snapshots that the ring holds for this rule


@dataclass
class Measure:
    """A loss in nats, and its parts: batches of held-out text, or steps."""

    loss: float
    parts: list[float]


@dataclass
class Review:
    """Decisions that are judged together: the first, and those made before its judgement."""

    decisions: list[int]
    rules: list[str]
    step: int  # of the snapshot to roll back to
    until: int
    before: Measure | None = None
    after: Measure | None = None
    is_asked: bool = False  # the second score was requested

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            if isinstance(found := getattr(self, name), dict):
                setattr(self, name, Measure(**found))


@dataclass(frozen=True)
class ReviewResult:
    """The outcome of decisions, given by their numbers."""

    decisions: list[int]
    is_good: bool
    text: str


class SafetyNet(Rule, Remembers):
    """Undoes harmful decisions, and suspends their rules until the problem is over.

    It cannot be disabled: it only undoes the work of other rules.
    """

    name = "safety_net"
    cool_down = 0
    remembered = ("spent", "best", "last", "_losses", "review")
    records: ClassVar[Mapping[str, type]] = {"review": Review}

    def __init__(self, *, has_text: bool = True) -> None:
        self.has_text = has_text
        smoothed = "the smoothed training loss (no data.val)"
        self._measured = "held-out loss" if has_text else smoothed
        self.review: Review | None = None
        self.result: ReviewResult | None = None  # until it is taken
        self.spent: dict[str, int] = {}  # suspended rules: remaining steps without a problem
        self.best: list[float] = []  # step, loss and noise of the best, once known
        self.is_record = False  # at this boundary
        self.last: list[float] = []
        self._losses = Window(SMOOTHED)  # of training, without held-out text

    def propose(self, now: Situation) -> Proposal | None:
        self._note(now)
        review = self.review
        if review is None:
            return None
        kept = now.snapshots.held.get(BASELINE)
        if kept is None or (review.is_asked and review.after is None):  # scoring failed
            self._end_review(now.snapshots)
        if kept is None or review.before is None or review.after is None:
            return None
        rise, error = _compared(review.before, review.after, is_paired=self.has_text)
        text = (
            f"{now.step - review.step} steps after step {review.step:,} {self._measured} was "
            f"{review.after.loss:.4g}, before that {review.before.loss:.4g}"
        )
        if rise <= _margin(review.before, error):
            self.result = ReviewResult(review.decisions, True, text)
            self._end_review(now.snapshots)
            return None
        self.spent |= dict.fromkeys(review.rules, SAME_TROUBLE)
        if now.rollbacks_left < 1:
            text += "; no more rollbacks are allowed"
            self.result = ReviewResult(review.decisions, False, text)
            self._end_review(now.snapshots)
            return None
        self.result = ReviewResult(review.decisions, False, f"{text}: undone")
        sure = confidence_of(rise / error) if error else 1.0
        return Proposal(
            self.name,
            HARD,
            max(SURE_ENOUGH[HARD], sure),
            (Rollback(kept.snapshot),),
            f"{text[0].upper()}{text[1:]}; {' and '.join(review.rules)} did not help.",
            {"loss": review.after.loss, "before": review.before.loss, "noise": error or 0.0},
            review.step,
        )

    def begin(self, proposal: Proposal, decision: int, now: Situation) -> bool:
        """Note that ``proposal`` is applied as ``decision``; returns whether to score text now."""
        if proposal.rule == self.name:
            self._end_review(now.snapshots)
        if proposal.judged_after is None:
            return False
        back = [one.snapshot for one in proposal.changes if isinstance(one, Rollback)]
        step = back[0].step if back else now.step
        until = step + proposal.judged_after
        if back:  # the step of the problem must have been passed
            until = max(until, now.step + proposal.judged_after // 4)
        review = self.review
        if review is not None and step >= review.step:
            review.decisions.append(decision)
            review.rules = sorted({*review.rules, proposal.rule})
            review.until, review.after, review.is_asked = until, None, False
            return False
        self._end_review(now.snapshots)
        if back:
            kept = now.snapshots.of(back[0])
            if kept is None:
                return False
            now.snapshots.held[BASELINE] = kept
        elif now.snapshots.most < 1:
            return False
        else:
            now.snapshots.hold(BASELINE, now.samples)
        self.review = Review([decision], [proposal.rule], step, until)
        return self.has_text

    def wants_score(self, step: int) -> bool:
        """Whether to score text now, to judge a decision."""
        review = self.review
        if not self.has_text or review is None or review.is_asked or step < review.until:
            return False
        review.is_asked = True
        return True

    def note_scores(self, loss: float, batch_losses: list[float]) -> None:
        measure = Measure(_number(loss), [_number(one) for one in batch_losses])
        if self.review is not None:
            setattr(self.review, "after" if self.review.is_asked else "before", measure)

    def went_back(self, step: int, snapshots: SnapshotRing) -> None:
        """Note a rollback to ``step``; a later review ends."""
        if self.best and self.best[0] > step and BEST not in snapshots.held:
            self.best = []
        if self.review is not None and step < self.review.step:
            self._end_review(snapshots)

    def note_validation(self, step: int, loss: float, is_best: bool) -> None:
        self.last = [step, _number(loss)]
        if is_best and (not self.best or self.last[1] < self.best[1]):
            self.best, self.is_record = [*self.last, 0.0], True

    def hold_best(self, snapshots: SnapshotRing, step: int, samples: int) -> None:
        """Keep a snapshot of ``step`` if it is the best; it survives rollbacks."""
        if self.is_record and snapshots.most:
            if snapshots.best is not None and snapshots.best.step == step:
                snapshots.held[BEST] = snapshots.best
            else:
                snapshots.hold(BEST, samples)
        self.is_record = False

    def is_best_level(self, step: int) -> bool:
        """Without held-out text: whether the training loss is at its best, at a new snapshot."""
        if self.has_text or len(self._losses) < FEWEST:
            return False
        level = self._level()
        if self.best and level.loss > self.best[1]:
            return False
        self.best, self.is_record = [step, level.loss, _noise(level)], True
        return True

    def _note(self, now: Situation) -> None:
        is_trouble = bool(now.outliers.streak or now.non_finite) or any(
            is_alarm(one.severity) and one.kind in (*LOSS_KINDS, *WEIGHT_KINDS)
            for one in now.events
        )
        for rule, left in list(self.spent.items()):
            self.spent[rule] = SAME_TROUBLE if is_trouble else left - 1
            if not self.spent[rule]:
                del self.spent[rule]
        if self.has_text:
            return
        review, loss = self.review, now.values.get("loss")
        if review is not None and review.before is None:
            review.before = self._level()
        if loss is not None:
            self._losses.add(_number(loss))
        if review is not None and now.step >= review.until:
            review.after = self._level(now.step - review.step)

    def _level(self, last: int = SMOOTHED) -> Measure:
        parts = self._losses.values[-last:]
        return Measure(_number(median(parts)), parts.tolist())

    def _end_review(self, snapshots: SnapshotRing) -> None:
        self.review = None
        snapshots.held.pop(BASELINE, None)

    def better_step(self, step: int) -> int | None:
        """The earlier step at which a run that ends at ``step`` was clearly better."""
        if not self.best or self.best[0] >= step:
            return None
        _, best, error = self.best
        if self.has_text:
            if not self.last or self.last[0] != step:
                return None
        else:
            self.last = [step, self._level().loss]
        is_worse = self.last[1] - best > _margin(Measure(best, []), error)
        return int(self.best[0]) if is_worse else None

    def returning(self, snapshot: Snapshot) -> Proposal:
        """The proposal to end the run with the weights of ``snapshot``, better than its last."""
        best, last = self.best[1], self.last[1]
        return Proposal(
            self.name,
            HARD,
            1.0,
            (Rollback(snapshot), Stop(returned_to=snapshot.step)),
            f"At the end {self._measured} was {last:.4g}, at its best {best:.4g}: the run "
            f"ends with the weights of step {snapshot.step:,}.",
            {"loss": last, "best": best},
        )

    def roll_back(self, state: dict[str, Any]) -> None:
        """Roll back to ``state``; the best stays."""
        self.last = list(state["last"])
        self._losses.load_state_dict(state["losses"])


def _compared(before: Measure, after: Measure, *, is_paired: bool) -> tuple[float, float | None]:
    """The rise of the loss, and its standard error, or None if unknown."""
    rise = after.loss - before.loss
    if min(len(before.parts), len(after.parts)) < FEWEST:
        return rise, None
    if not is_paired:
        return rise, _noise(before)
    if len(before.parts) != len(after.parts):  # smaller batches after running out of memory
        return rise, None
    differences = np.subtract(after.parts, before.parts)
    return rise, float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _margin(before: Measure, error: float | None) -> float:
    """The rise of a loss that does not count as clearly worse."""
    size = max(abs(before.loss), SMALL)
    return CRUDE * size if error is None else max(CLEARLY * error, LEAST * size)


def _noise(level: Measure) -> float:
    """The standard error of the difference of two such levels."""
    count = len(level.parts)
    if count < FEWEST:
        return 0.0
    return MEDIAN * math.sqrt(2 / count) * deviation(np.array(level.parts))


def _number(loss: float) -> float:
    return min(loss, NO_NUMBER) if math.isfinite(loss) else NO_NUMBER
