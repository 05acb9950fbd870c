"""The guard of updates: skips those of outliers, within the step, on each process."""

from __future__ import annotations

from ultrathink.monitoring.records import Reporter
from ultrathink.orchestrator.steering.outliers import OutlierFilter
from ultrathink.training.stepping import Verdict


class OutlierGuard(OutlierFilter):
    """Applies ``OutlierFilter`` as the trainer's guard; if it fails, all further updates pass."""

    def __init__(self, *, most: float, report: Reporter) -> None:
        super().__init__(most=most)
        self._report = report
        self._has_failed = False

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        """The verdict on an update of this loss (nats) and norm."""
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
