"""Learning-rate schedules: the factor of each group's peak rate, as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ultrathink.config.optimizer import SCHEDULES, CosineConfig, ScheduleConfig, WsdConfig
from ultrathink.training.budget import Budget
from ultrathink.training.settings import LiveSettings

Factor = Callable[[int], float]  # step, counted from 1 -> share of the peak learning rate


def build_schedule(config: ScheduleConfig, budget: Budget) -> Factor:
    """The schedule of ``config``, resolved to steps."""
    factor: Factor = SCHEDULES.load(config.type)(config, budget)
    return factor


def continued_schedule(config: ScheduleConfig, budget: Budget, settings: LiveSettings) -> Factor:
    """The schedule as ``settings`` continue it: started after ``schedule_start``, and capped."""
    start, ceiling = settings.schedule_start, settings.schedule_ceiling
    remaining = max(1, budget.total_steps - start)
    factor = build_schedule(config, replace(budget, total_steps=remaining))
    return lambda step: min(ceiling, factor(step - start))


def ceiling_at(schedule: Factor, step: int, ceiling: float) -> float:
    """The cap after ``step``, so that another schedule or length never raises the rate.

    During warm-up the current factor is no cap; ``ceiling`` is the cap so far.
    """
    if step < 1 or schedule(step + 1) > schedule(step):
        return ceiling
    return min(ceiling, schedule(step))


def cosine_factor(config: CosineConfig, budget: Budget) -> Factor:
    """Linear warm-up, then half a cosine to ``min_ratio`` (arXiv:1608.03983, without restarts)."""
    warmup = min(budget.steps(config.warmup), budget.total_steps)
    length = max(1, budget.total_steps - warmup)

    def factor(step: int) -> float:
        if step <= warmup:
            return step / warmup
        progress = min(1.0, (step - 1 - warmup) / length)
        return config.min_ratio + (1 - config.min_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def wsd_factor(config: WsdConfig, budget: Budget) -> Factor:
    """Linear warm-up, a plateau, then a decay to ``min_ratio`` (arXiv:2404.06395)."""
    warmup = min(budget.steps(config.warmup), budget.total_steps)
    decay = min(budget.steps(config.decay), budget.total_steps - warmup)
    decay_start = budget.total_steps - decay

    def factor(step: int) -> float:
        if step <= warmup:
            return step / warmup
        if step <= decay_start:
            return 1.0
        progress = min(1.0, (step - 1 - decay_start) / max(1, decay))
        remaining = 1 - progress if config.shape == "linear" else 1 - math.sqrt(progress)
        return config.min_ratio + (1 - config.min_ratio) * remaining

    return factor
