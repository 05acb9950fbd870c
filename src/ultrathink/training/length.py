"""The length of a run in steps: resolved at the start, and corrected if given in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from ultrathink.config.training import TrainingConfig
from ultrathink.parallel.world import World
from ultrathink.training.budget import Budget, Speed, steps_within
from ultrathink.training.clock import Clock
from ultrathink.training.endings import Ending, returned_to
from ultrathink.training.hardware import synchronize
from ultrathink.training.records import ChangeRecord
from ultrathink.training.run_state import Progress
from ultrathink.training.schedules import Factor, continued_schedule
from ultrathink.training.settings import LiveSettings

# Time spent to convert minutes to steps: this share of the run's minutes, and at least five steps.
TRIAL_SHARE = 0.004
_TRIAL_MIN_STEPS = 5
# The machine may have been busy during the timing at the start: after these shares of the minutes
# the measured pace corrects the length, if the two differ by more than this factor.
_LOOKS = (0.1, 0.3, 0.5, 0.7)
_SETTLED_WITHIN = 1.05


class Length:
    """The budget of a run in steps, and the schedule of the learning rate that follows from it.

    ``max_minutes`` is the time limit of training; None: no limit.
    """

    def __init__(
        self, training: TrainingConfig, settings: LiveSettings, budget: Budget | None = None
    ) -> None:
        self.max_minutes = training.max_minutes
        self.budget = budget  # None until training starts
        self._training = training
        self._settings = settings
        self._schedule: Factor | None = None

    @property
    def total_steps(self) -> int:
        """The length in steps; 0 while it is not known."""
        return self.budget.total_steps if self.budget is not None else 0

    def set(self, budget: Budget) -> None:
        """Use ``budget`` for the run and its learning-rate schedule from now on."""
        self.budget = budget
        self.follow_settings()

    def follow_settings(self) -> None:
        """Start the schedule where the settings say."""
        assert self.budget is not None
        self._schedule = continued_schedule(self._training.schedule, self.budget, self._settings)

    def ending(self, progress: Progress, elapsed_s: float) -> Ending | None:
        """Why the run ends here; None if steps and time are left."""
        assert self.budget is not None
        if progress.is_over:
            return returned_to(progress.step)
        return self.budget.ending(progress.step, elapsed_s, self.max_minutes)

    def lr_factor(self, step: int) -> float:
        """The factor of the peak rate in ``step``, without corrections of faults."""
        assert self._schedule is not None
        factor = self._schedule(step)
        return factor * self._settings.lr_factor_at(step) * self._settings.lr_scale

    def reopen(self) -> None:
        """After a rollback, follow the earlier settings and check again how many steps fit."""
        assert self.budget is not None
        if self.max_minutes is not None and self._training.step_budget is None:
            self.budget = replace(self.budget, is_settled=False, looks=0)
        self.follow_settings()

    def settle(
        self,
        progress: Progress,
        clock: Clock,
        validation_s: Callable[[], float],
        evaluators_s: Callable[[], float],
    ) -> ChangeRecord | None:
        """Correct a length in minutes if steps are slower or faster than estimated, or were undone.

        Returns the record of a correction. It is checked four times, and after each rollback.
        """
        minutes, budget = self.max_minutes, self.budget
        assert budget is not None
        if minutes is None or budget.is_settled:
            return None
        looks = sum(clock.elapsed_s >= share * minutes * 60 for share in _LOOKS)
        if looks <= budget.looks and progress.step < budget.total_steps:
            return None
        is_settled = looks == len(_LOOKS)
        step_s = clock.steps_s / clock.num_steps
        speed = Speed(step_s, validation_s(), clock.elapsed_s, evaluators_s())
        total = progress.step + steps_within(minutes, speed, self._training.eval.every_steps)
        corrected = replace(
            budget,
            total_steps=total,
            seconds_per_step=speed.step_s,
            validation_s=speed.validation_s,
            is_settled=is_settled,
            looks=looks,
        )
        is_over = clock.elapsed_s >= minutes * 60 - corrected.reserve_s
        differs = max(total, budget.total_steps) > _SETTLED_WITHIN * min(total, budget.total_steps)
        if is_over or not differs:
            self.budget = replace(budget, is_settled=is_settled, looks=looks)
            return None
        self.set(corrected)
        slower = speed.step_s / max(budget.seconds_per_step, 1e-9)
        reason = f"a step takes {speed.step_s:.3g} s, not {budget.seconds_per_step:.3g}"
        if 1 / _SETTLED_WITHIN < slower < _SETTLED_WITHIN:
            reason = "some steps were repeated after a rollback, and the minutes are limited"
        return ChangeRecord(
            progress.step, "training.step_budget", budget.total_steps, total, reason
        )

    def state_dict(self) -> dict[str, float] | None:
        return asdict(self.budget) if self.budget is not None else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.budget = Budget(**state)


def seconds_per_step(
    take_step: Callable[[], object], minutes: float, world: World, device: torch.device
) -> float:
    """Time a few steps, after one that compiles; returns the first process's figure on all."""
    take_step()
    step_s: list[float] = []
    trial_s = minutes * 60 * TRIAL_SHARE
    while len(step_s) < _TRIAL_MIN_STEPS or world.of_main(sum(step_s)) < trial_s:
        began = time.perf_counter()
        take_step()
        synchronize(device)
        step_s.append(time.perf_counter() - began)
    return world.of_main(sum(step_s) / len(step_s))
