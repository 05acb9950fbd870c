"""Validation in batches that fit into memory."""

from __future__ import annotations

import time

from ultrathink.core.errors import OutOfMemoryError
from ultrathink.monitoring.records import Reporter
from ultrathink.parallel.world import World
from ultrathink.training.objectives.base import Objective
from ultrathink.training.out_of_memory import smaller_until_it_fits
from ultrathink.training.validation import Scores


class Scorer:
    """Validates an objective; if memory runs out, in smaller batches from then on."""

    def __init__(
        self,
        objective: Objective,
        batch_size: int,
        *,
        world: World,
        report: Reporter,
    ) -> None:
        self.batch_size = batch_size
        self._objective = objective
        self._world = world
        self._report = report

    def score(self, max_batches: int | None = None) -> Scores:
        """Score the objective's validation data, or its first batches."""

        def attempt(size: int) -> Scores:
            return self._objective.score(size, max_batches)

        def smaller(size: int, problem: str) -> int:
            if size > 1 and self._world.size == 1:
                return size // 2
            raise OutOfMemoryError(
                f"validation ran out of memory with batches of {size} ({problem}). Use a lower "
                f"training.eval.batch_size, or if it is 1 a lower data.seq_len, and resume from "
                f"the last checkpoint: ultrathink train --resume RUN."
            )

        before = self.batch_size
        scores, fit = smaller_until_it_fits(attempt, before, smaller)
        if fit.size != before:
            self.batch_size = fit.size
            self._report(
                f"validation now takes {fit.size} sequences at a time instead of {before}: "
                f"{fit.problem}",
                "warning",
            )
        return scores

    def estimated_s(self) -> float:
        """Estimated seconds of a full validation, from three batches of it."""
        if not self._objective.can_score:
            return 0.0
        self.score(max_batches=1)  # the first allocates memory
        began = time.perf_counter()
        scores = self.score(max_batches=3)
        seconds = self._world.of_main(time.perf_counter() - began)
        return seconds * self._objective.num_scored / max(1, scores.num_tokens)
