"""Validation in batches that fit into memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ultrathink.core.errors import OutOfMemoryError
from ultrathink.monitoring.records import Reporter
from ultrathink.parallel.world import World
from ultrathink.training.objectives.base import Objective
from ultrathink.training.out_of_memory import Fit, smaller_until_it_fits
from ultrathink.training.validation import Scores


def in_batches_that_fit(
    attempt: Callable[[int], Scores], size: int, *, can_shrink: bool, what: str, advice: str
) -> tuple[Scores, Fit]:
    """``attempt`` with batches of ``size``, or smaller ones if memory runs out.

    Raises OutOfMemoryError with ``advice`` if they cannot shrink.
    """

    def smaller(size: int, problem: str) -> int:
        if size > 1 and can_shrink:
            return size // 2
        raise OutOfMemoryError(
            f"{what} ran out of memory with batches of {size} ({problem}). {advice}"
        )

    return smaller_until_it_fits(attempt, size, smaller)


@dataclass
class Scorer:
    """Validates an objective; if memory runs out, in smaller batches from then on."""

    objective: Objective
    batch_size: int
    world: World
    report: Reporter

    def score(self, max_batches: int | None = None) -> Scores:
        """Score the objective's validation data, or its first batches."""
        before = self.batch_size
        scores, fit = in_batches_that_fit(
            lambda size: self.objective.score(size, max_batches),
            before,
            can_shrink=self.world.size == 1,
            what="validation",
            advice="Use a lower training.eval.batch_size, or if it is 1 a lower data.seq_len, and "
            "resume from the last checkpoint: ultrathink train --resume RUN.",
        )
        if fit.size != before:
            self.batch_size = fit.size
            self.report(
                f"validation now takes {fit.size} sequences at a time instead of {before}: "
                f"{fit.problem}",
                "warning",
            )
        return scores

    def estimated_s(self) -> float:
        """Estimated seconds of a full validation, from three batches of it."""
        if not self.objective.can_score:
            return 0.0
        self.score(max_batches=1)  # the first allocates memory
        began = time.perf_counter()
        scores = self.score(max_batches=3)
        seconds = self.world.of_main(time.perf_counter() - began)
        return seconds * self.objective.num_scored / max(1, scores.num_tokens)
