"""The net under steering: what does not help is taken back, and a run ends with its best weights.

A decision that is no exact repair is judged some steps later: held-out text is scored once where
the decision leaves the run, or goes back to, and once then. Where there is no such text, the
smoothed training loss serves.
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

CLEARLY = 3.0  # standard errors: as sure as a hard decision has to be
LEAST = 0.01  # of the loss: a run that learns may be so much worse for a while
CRUDE = 0.02  # the same where nothing tells the noise
FEWEST = 4  # batches or steps that tell the noise
NO_NUMBER = 1e9  # stands for a loss that is none
SMOOTHED = 16  # steps
MEDIAN = 1.2533  # standard error of a median, of that of a mean
BASELINE, BEST = "safety_net", "safety_net.best"  # what the ring holds to go back to


@dataclass
class Measure:
    """A loss in nats, and what it is made of: batches of held-out text, or steps."""

    loss: float
    parts: list[float]


@dataclass
class Watch:
    """Decisions that are judged together: the first, and those that came before it was."""

    decisions: list[int]
    rules: list[str]
    step: int  # of what to go back to
    until: int
    before: Measure | None = None
    after: Measure | None = None
    is_asked: bool = False  # text is to be scored again

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            if isinstance(found := getattr(self, name), dict):
                setattr(self, name, Measure(**found))


@dataclass(frozen=True)
class Verdict:
    """What came of decisions, by their numbers."""

    decisions: list[int]
    is_good: bool
    text: str


class SafetyNet(Rule, Remembers):
    """Takes back what did harm, and lets its rule rest until the trouble is over.

    It is no rule to be switched off: what it takes back is the work of others.
    """

    name = "safety_net"
    cool_down = 0
    remembered = ("spent", "best", "last", "_losses", "watch")
    records: ClassVar[Mapping[str, type]] = {"watch": Watch}

    def __init__(self, *, has_text: bool = True) -> None:
        self.has_text = has_text
        smoothed = "the smoothed training loss (no data.val)"
        self._measured = "held-out loss" if has_text else smoothed
        self.watch: Watch | None = None
        self.verdict: Verdict | None = None  # until somebody takes it
        self.spent: dict[str, int] = {}  # steps without trouble that rules still wait for
        self.best: list[float] = []  # its step, loss and noise, once known
        self.is_record = False  # at this boundary
        self.last: list[float] = []
        self._losses = Window(SMOOTHED)  # of training, where there is no text

    def propose(self, now: Situation) -> Proposal | None:
        self._note(now)
        watch = self.watch
        if watch is None:
            return None
        kept = now.snapshots.held.get(BASELINE)
        if kept is None or (watch.is_asked and watch.after is None):  # it could not be scored
            self._let_go(now.snapshots)
        if kept is None or watch.before is None or watch.after is None:
            return None
        rise, error = _compared(watch.before, watch.after, is_paired=self.has_text)
        text = (
            f"{now.step - watch.step} steps after step {watch.step:,} {self._measured} was "
            f"{watch.after.loss:.4g}, where it had been {watch.before.loss:.4g}"
        )
        if rise <= _margin(watch.before, error):
            self.verdict = Verdict(watch.decisions, True, text)
            self._let_go(now.snapshots)
            return None
        self.spent |= dict.fromkeys(watch.rules, SAME_TROUBLE)
        if now.rollbacks_left < 1:
            self.verdict = Verdict(watch.decisions, False, f"{text}; the run may not go back again")
            self._let_go(now.snapshots)
            return None
        self.verdict = Verdict(watch.decisions, False, f"{text}: it is taken back")
        sure = confidence_of(rise / error) if error else 1.0
        return Proposal(
            self.name,
            HARD,
            max(SURE_ENOUGH[HARD], sure),
            (Rollback(kept.snapshot),),
            f"{text[0].upper()}{text[1:]}; {' and '.join(watch.rules)} did not help.",
            {"loss": watch.after.loss, "before": watch.before.loss, "noise": error or 0.0},
            watch.step,
        )

    def begin(self, proposal: Proposal, decision: int, now: Situation) -> bool:
        """A proposal is carried out as ``decision``; whether text is to be scored after it."""
        if proposal.rule == self.name:
            self._let_go(now.snapshots)
        if proposal.judged_after is None:
            return False
        back = [one.snapshot for one in proposal.changes if isinstance(one, Rollback)]
        step = back[0].step if back else now.step
        until = step + proposal.judged_after
        if back:  # what the trouble was at must have been passed
            until = max(until, now.step + proposal.judged_after // 4)
        watch = self.watch
        if watch is not None and step >= watch.step:
            watch.decisions.append(decision)
            watch.rules = sorted({*watch.rules, proposal.rule})
            watch.until, watch.after, watch.is_asked = until, None, False
            return False
        self._let_go(now.snapshots)
        if back:
            kept = now.snapshots.of(back[0])
            if kept is None:
                return False
            now.snapshots.held[BASELINE] = kept
        elif now.snapshots.most < 1:
            return False
        else:
            now.snapshots.hold(BASELINE, now.samples)
        self.watch = Watch([decision], [proposal.rule], step, until)
        return self.has_text

    def wants_score(self, step: int) -> bool:
        """Whether text is to be scored now, to judge a decision."""
        watch = self.watch
        if not self.has_text or watch is None or watch.is_asked or step < watch.until:
            return False
        watch.is_asked = True
        return True

    def note_scores(self, loss: float, batch_losses: list[float]) -> None:
        """Text was scored, as was asked for."""
        measure = Measure(_number(loss), [_number(one) for one in batch_losses])
        if self.watch is not None:
            setattr(self.watch, "after" if self.watch.is_asked else "before", measure)

    def went_back(self, step: int, snapshots: SnapshotRing) -> None:
        """The run stands at ``step`` now; what is watched may not have happened."""
        if self.best and self.best[0] > step and BEST not in snapshots.held:
            self.best = []
        if self.watch is not None and step < self.watch.step:
            self._let_go(snapshots)

    def note_validation(self, step: int, loss: float, is_best: bool) -> None:
        """The run was validated; what was undone since may have been better."""
        self.last = [step, _number(loss)]
        if is_best and (not self.best or self.last[1] < self.best[1]):
            self.best, self.is_record = [*self.last, 0.0], True

    def hold_best(self, snapshots: SnapshotRing, step: int, samples: int) -> None:
        """Keep a snapshot of ``step`` where it is the best, whatever a rollback undoes."""
        if self.is_record and snapshots.most:
            if snapshots.best is not None and snapshots.best.step == step:
                snapshots.held[BEST] = snapshots.best
            else:
                snapshots.hold(BEST, samples)
        self.is_record = False

    def is_best_level(self, step: int) -> bool:
        """Whether training without text was never better than now, at a new snapshot."""
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
        watch, loss = self.watch, now.values.get("loss")
        if watch is not None and watch.before is None:
            watch.before = self._level()
        if loss is not None:
            self._losses.add(_number(loss))
        if watch is not None and now.step >= watch.until:
            watch.after = self._level(now.step - watch.step)

    def _level(self, last: int = SMOOTHED) -> Measure:
        parts = self._losses.values[-last:]
        return Measure(_number(median(parts)), parts.tolist())

    def _let_go(self, snapshots: SnapshotRing) -> None:
        self.watch = None
        snapshots.held.pop(BASELINE, None)

    def better_step(self, step: int) -> int | None:
        """The step that a run which ends at ``step`` was clearly better at."""
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
        """The end of a run with the weights of ``snapshot``, which are better than its last."""
        best, last = self.best[1], self.last[1]
        return Proposal(
            self.name,
            HARD,
            1.0,
            (Rollback(snapshot), Stop(returned_to=snapshot.step)),
            f"At the end {self._measured} was {last:.4g}, where it had been {best:.4g}: the run "
            f"ends with the weights of step {snapshot.step:,}.",
            {"loss": last, "best": best},
        )

    def roll_back(self, state: dict[str, Any]) -> None:
        """The run goes back to when ``state_dict`` returned ``state``; its best stays the best."""
        self.last = list(state["last"])
        self._losses.load_state_dict(state["losses"])


def _compared(before: Measure, after: Measure, *, is_paired: bool) -> tuple[float, float | None]:
    """By how much the loss has risen, and the standard error of that; None where unknown."""
    rise = after.loss - before.loss
    if min(len(before.parts), len(after.parts)) < FEWEST:
        return rise, None
    if not is_paired:
        return rise, _noise(before)
    if len(before.parts) != len(after.parts):  # memory did not suffice for such batches
        return rise, None
    differences = np.subtract(after.parts, before.parts)
    return rise, float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _margin(before: Measure, error: float | None) -> float:
    """What a loss may rise by without being clearly worse."""
    size = max(abs(before.loss), SMALL)
    return CRUDE * size if error is None else max(CLEARLY * error, LEAST * size)


def _noise(level: Measure) -> float:
    """The standard error of the difference of two such levels; one that is broken varies more."""
    count = len(level.parts)
    if count < FEWEST:
        return 0.0
    return MEDIAN * math.sqrt(2 / count) * deviation(np.array(level.parts))


def _number(loss: float) -> float:
    return min(loss, NO_NUMBER) if math.isfinite(loss) else NO_NUMBER
