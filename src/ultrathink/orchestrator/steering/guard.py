"""The bridge from the guard, which decides within a step on each process, to the trainer."""

from __future__ import annotations

from ultrathink.monitoring.records import Reporter
from ultrathink.orchestrator.steering.outliers import OutlierFilter
from ultrathink.training.stepping import Verdict


class OutlierGuard(OutlierFilter):
    """Speaks to the trainer for ``OutlierFilter``; once that fails, every update passes."""

    def __init__(self, *, most: float, report: Reporter) -> None:
        super().__init__(most=most)
        self._report = report
        self._has_failed = False

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        """The verdict on an update of this loss (nats) and norm."""
        if self._has_failed:
            return Verdict()
        try:
            return Verdict(skip=self.leaves_out(step_loss, grad_norm))
        except Exception as error:
            self._has_failed, self.streak = True, 0
            self._report(
                f"the guard failed and leaves out nothing more; training goes on: "
                f"{type(error).__name__}: {error}",
                "warning",
            )
            return Verdict()
