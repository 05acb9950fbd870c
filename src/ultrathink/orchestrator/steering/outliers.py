"""Finds steps whose loss or gradient norm is an outlier, before their update is applied.

Each process has its own filter, which sees the same numbers and so decides the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ultrathink.monitoring.records import Reporter
from ultrathink.orchestrator.detectors.base import Baseline
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.signals import SMALL
from ultrathink.orchestrator.windows import Window
from ultrathink.training.stepping import Verdict

FAR_LOSS = (8.0, math.log(1.3))  # standard deviations, and rise in the logarithm
FAR_BELOW = (-8.0, -math.log(1.5))  # a repeated batch, or targets that leak into the inputs
FAR_NORM = (10.0, math.log(8.0))
ENOUGH = 64  # accepted steps before anything is judged
PATIENCE = 48  # skipped steps in a row, after which the new level is accepted


@dataclass(frozen=True)
class Judgement:
    """The figures of the last judged update."""

    loss: float
    loss_level: float
    loss_score: float  # robust standard deviations above the level
    norm: float
    norm_level: float
    norm_score: float

    @property
    def score(self) -> float:
        """The larger of the two scores; for the loss in either direction."""
        return max(abs(self.loss_score), self.norm_score)

    def values(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "loss_level": self.loss_level,
            "loss_score": self.loss_score,
            "grad_norm": self.norm,
            "grad_norm_level": self.norm_level,
            "grad_norm_score": self.norm_score,
        }


class OutlierFilter(Remembers):
    """Skips steps whose loss or gradient norm is far from those of accepted steps.

    Robust scores (median, median deviation) use accepted steps only, so that outliers do not become
    usual. ``most`` is the largest share of the last 256 steps that may be skipped.
    """

    remembered = ("_losses", "_norms", "_recent", "streak")

    def __init__(self, *, most: float = 0.25) -> None:
        self.most = most
        self.streak = 0  # skipped steps in a row, including this one
        self.last: Judgement | None = None
        self._losses = Baseline()
        self._norms = Baseline(level=64, floor=0.05)
        self._recent = Window(256)  # 1 for each skipped step, 0 for the others

    @property
    def loss_level(self) -> float | None:
        """The median loss of the last accepted steps, nats; None before the first."""
        level = self._losses.level
        return None if math.isnan(level) else math.exp(level) - SMALL

    def skips(self, step_loss: float, grad_norm: float) -> bool:
        """Whether to skip an update of this loss (nats) and norm."""
        loss = math.log(step_loss + SMALL) if step_loss > -SMALL else math.log(SMALL)
        norm = math.log(max(grad_norm, 1e-30))
        self.last = seen = Judgement(
            step_loss,
            math.exp(self._losses.level) - SMALL,
            self._losses.score(loss),
            grad_norm,
            math.exp(self._norms.level),
            self._norms.score(norm),
        )
        is_far = len(self._losses) >= ENOUGH and (
            (seen.loss_score >= FAR_LOSS[0] and self._losses.excess(loss) >= FAR_LOSS[1])
            or (seen.loss_score <= FAR_BELOW[0] and loss - self._losses.level <= FAR_BELOW[1])
            or (seen.norm_score >= FAR_NORM[0] and norm - self._norms.level >= FAR_NORM[1])
        )
        if is_far and self.streak >= PATIENCE:
            self._losses.restart()
            self._norms.restart()
            is_far = False
        skip = is_far and self._share() < self.most
        self._recent.add(float(skip))
        self.streak = self.streak + 1 if skip else 0
        if not is_far:
            self._losses.add(loss)
            self._norms.add(norm)
        return skip

    def _share(self) -> float:
        return float(self._recent.values.sum()) / self._recent.size


class OutlierGuard(OutlierFilter):
    """Applies ``OutlierFilter`` as the trainer's guard; if it fails, all further updates pass."""

    def __init__(self, *, most: float, report: Reporter) -> None:
        super().__init__(most=most)
        self._report = report
        self._has_failed = False

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        if self._has_failed:
            return Verdict()
        try:
            return Verdict(skip=self.skips(step_loss, grad_norm))
        except Exception as error:
            self._has_failed, self.streak = True, 0
            self._report(
                f"the guard failed and skips no more updates; training continues: "
                f"{type(error).__name__}: {error}",
                "warning",
            )
            return Verdict()
