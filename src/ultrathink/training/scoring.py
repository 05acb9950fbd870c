"""Scoring a model on held-out text in batches that memory suffices for."""

from __future__ import annotations

import time

import torch
from torch import nn

from ultrathink.config.training import EvalConfig
from ultrathink.core.errors import OutOfMemoryError
from ultrathink.data.validation import ValidationSet
from ultrathink.monitoring.records import Tell
from ultrathink.parallel.world import World
from ultrathink.training.out_of_memory import smaller_until_it_fits
from ultrathink.training.validation import Scores, evaluate


class Scorer:
    """Scores ``model``, in smaller batches from there on where memory does not suffice."""

    def __init__(
        self, model: nn.Module, rule: EvalConfig, *, device: torch.device, world: World, tell: Tell
    ) -> None:
        self.batch_size = rule.batch_size
        self._model = model
        self._rule = rule
        self._device = device
        self._world = world
        self._tell = tell

    def score(self, held_out: ValidationSet, max_batches: int | None = None) -> Scores:
        """Score the model on held-out text, or on its first batches."""

        def attempt(size: int) -> Scores:
            return evaluate(
                self._model,
                held_out,
                device=self._device,
                batch_size=size,
                max_tokens=self._rule.max_tokens,
                max_batches=max_batches,
                world=self._world,
            )

        def smaller(size: int, problem: str) -> int:
            if size > 1 and self._world.size == 1:
                return size // 2
            raise OutOfMemoryError(
                f"validation ran out of memory with batches of {size} ({problem}). Take a lower "
                f"training.eval.batch_size, or where it is 1 a lower data.seq_len, and go on from "
                f"the last checkpoint: ultrathink train --resume RUN."
            )

        before = self.batch_size
        scores, fit = smaller_until_it_fits(attempt, before, smaller)
        if fit.size != before:
            self.batch_size = fit.size
            self._tell(
                f"validation takes {fit.size} sequences at a time, no longer {before}: "
                f"{fit.problem}",
                "warning",
            )
        return scores

    def estimated_s(self, held_out: ValidationSet | None) -> float:
        """Seconds that a whole validation will take, from three batches of it."""
        if held_out is None:
            return 0.0
        self.score(held_out, max_batches=1)  # the first pays for fresh memory
        began = time.perf_counter()
        scores = self.score(held_out, max_batches=3)
        num_tokens, _ = held_out.extent(self._rule.max_tokens)
        seconds = self._world.of_main(time.perf_counter() - began)
        return seconds * num_tokens / max(1, scores.num_tokens)
