"""For a learning rate that is too high from the start: lower ones are tried on the same batches.

A rate that is several times too high makes a run end far worse without ever breaking it. An early
sign is large updates relative to the weights, but what is large depends on the model, so it is only
a reason to try. The run rolls back to its start, repeats the same batches with a third of the rate,
and continues with the rate of the lower loss; this repeats while it helps.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from ultrathink.orchestrator.events import SEVERITIES
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.steering.proposals import (
    SOFT,
    SURE_ENOUGH,
    Proposal,
    confidence_after,
    confidence_of,
)
from ultrathink.orchestrator.steering.rules import LOSS_KINDS, Rule, Situation
from ultrathink.training.changes import Rollback, ScaleLearningRate

LARGE_UPDATE = 0.05  # relative to the weights; tuned rates stay below 0.04 (docs/steering.md)
ENOUGH = 2  # logged steps with such an update
LOWER = 1 / 3
SHARE = 0.1  # share of the run that is observed, and that a trial takes
FEWEST, MOST = 32, 1000  # steps of a trial
COMPARED = 0.25  # last share of a trial, over which losses are compared
CLEARLY = 2.0  # standard errors of the mean of paired differences
LEAST_GAIN = 0.002  # of the loss: less does not justify a lower rate
NO_NUMBER = 1e9  # replaces a loss of NaN or infinity
START, BEST = "start", "best"  # snapshots that the ring holds for this rule


class FindRate(Rule, Remembers):
    """If the rate is too high from the start, restart with a third of it, while that helps."""

    name = "find_rate"
    cool_down = 0
    remembered = (
        "_phase",
        "_end",
        "_num_large",
        "_reason",
        "_scheduled",
        "_losses",
        "_best_losses",
        "_best_scale",
    )

    WATCHING: ClassVar[str] = "watching"
    SUSPECTING: ClassVar[str] = "suspecting"  # the configured rate is being measured
    TRYING: ClassVar[str] = "trying"
    DONE: ClassVar[str] = "done"

    def __init__(self) -> None:
        self._phase = self.WATCHING
        self._end = 0  # the step at which a trial ends
        self._num_large = 0
        self._reason = ""
        self._scheduled = 0.0  # the rate of the previous step
        self._losses: dict[str, float] = {}  # of this trial, by step
        self._best_losses: dict[str, float] = {}
        self._best_scale = 1.0
        self.outcome: tuple[bool, str] | None = None

    def is_busy(self, now: Situation) -> bool:
        is_at_end = self._phase == self.SUSPECTING and now.step >= self._end
        return self._phase == self.TRYING or is_at_end

    def propose(self, now: Situation) -> Proposal | None:
        if self._phase == self.DONE:
            _let_go(now)
            return None
        if self._phase == self.TRYING and not {START, BEST} <= now.snapshots.held.keys():
            self.outcome = (False, "its snapshots are gone: the run continues unchanged")
            self._give_up(now)
            return None
        self._note(now)
        if self._phase == self.WATCHING:
            self._watch(now)
        if self._phase in (self.WATCHING, self.DONE) or now.step < self._end:
            return None
        return self._compare(now)

    def _note(self, now: Situation) -> None:
        loss, scheduled = now.values.get("loss", math.nan), now.values.get("lr_scheduled", 0.0)
        self._losses[str(now.step)] = loss if math.isfinite(loss) else NO_NUMBER
        if self._phase != self.TRYING:
            if not self._end:
                length = int(SHARE * now.total_steps)
                self._end = min(length, MOST) if length >= FEWEST else 0
            if scheduled > self._scheduled > 0:  # still in warm-up
                self._end = max(self._end, 2 * now.step)
            self._scheduled = scheduled

    def _watch(self, now: Situation) -> None:
        """Wait for a reason to try lower rates, while the trials would be short enough."""
        first = now.snapshots.first
        is_over = now.step > self._end or 2 * self._end > now.total_steps
        if is_over or now.snapshots.most < 3:
            self._give_up(now)
        if is_over or first is None:
            return
        now.snapshots.held.setdefault(START, first)
        ratio = now.values.get("update_ratio", 0.0)
        self._num_large += ratio > LARGE_UPDATE
        grave = [
            one
            for one in now.events
            if one.kind in LOSS_KINDS and SEVERITIES.index(one.severity) >= SEVERITIES.index("high")
        ]
        if self._num_large >= ENOUGH:
            self._reason = f"Updates are up to {ratio:.2g} of the weights."
        elif grave:
            self._reason = grave[0].message[0].upper() + grave[0].message[1:] + "."
        if self._reason:
            self._phase = self.SUSPECTING

    def _compare(self, now: Situation) -> Proposal | None:
        scale = now.settings.lr_scale
        first_step = self._end - max(1, int(COMPARED * self._end))
        losses = {step: loss for step, loss in self._losses.items() if int(step) > first_step}
        self._losses = {}
        lower = max(scale * LOWER, now.limits.lr_factor[0])
        may_try = lower < 0.9 * scale and now.rollbacks_left >= 2
        if self._phase == self.SUSPECTING:
            if not may_try or START not in now.snapshots.held:
                self._give_up(now)
                return None
            self._phase, is_better = self.TRYING, True
            sure, text = confidence_after(max(ENOUGH, self._num_large)), self._reason
        else:
            gain, error = _paired(losses, self._best_losses)
            sure = max(SURE_ENOUGH[SOFT], confidence_of(abs(gain) / error))
            text = self._described(scale, losses)
            is_better = gain > max(CLEARLY * error, LEAST_GAIN * _mean(self._best_losses))
            self.outcome = (is_better, text)
            if not is_better and (gain < -CLEARLY * error or not may_try):
                return self._return_to_best(now, sure, text)
            if not may_try:
                self._give_up(now)
                return None
        if is_better:
            now.snapshots.hold(BEST, now.samples)
            self._best_losses, self._best_scale = losses, scale
        start = now.snapshots.held[START]
        return Proposal(
            self.name,
            SOFT,
            sure,
            (Rollback(start.snapshot, skip_data=False), ScaleLearningRate(lower)),
            f"{text} The same {self._end - start.step:,} steps are repeated with {lower:.3g} times "
            f"the configured rate.",
            {"loss": _mean(losses), "lr_scale": scale},
            now.step,
        )

    def _return_to_best(self, now: Situation, sure: float, text: str) -> Proposal:
        self._phase = self.DONE
        return Proposal(
            self.name,
            SOFT,
            sure,
            (Rollback(now.snapshots.held[BEST].snapshot, skip_data=False),),
            f"{text} The run continues with {self._best_scale:.3g} times the configured rate.",
            {"loss": _mean(self._best_losses), "lr_scale": self._best_scale},
            now.step,
        )

    def _described(self, scale: float, losses: dict[str, float]) -> str:
        return (
            f"With {scale:.3g} times the configured rate the loss was {_mean(losses):.4g} over the "
            f"last {len(losses)} of {self._end:,} steps, with {self._best_scale:.3g} times "
            f"{_mean(self._best_losses):.4g} on the same batches."
        )

    def _give_up(self, now: Situation) -> None:
        self._phase = self.DONE
        self._losses, self._best_losses = {}, {}
        _let_go(now)


def _let_go(now: Situation) -> None:
    for name in (START, BEST):
        now.snapshots.held.pop(name, None)


def _paired(losses: dict[str, float], best: dict[str, float]) -> tuple[float, float]:
    """How much lower ``losses`` are on the same batches: the mean and its standard error."""
    gains = np.array([best[step] - loss for step, loss in losses.items() if step in best])
    if len(gains) < 2:
        return 0.0, math.inf
    return float(gains.mean()), max(float(gains.std(ddof=1)) / math.sqrt(len(gains)), 1e-9)


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / max(1, len(losses))
