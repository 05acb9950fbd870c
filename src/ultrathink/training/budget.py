"""The length of a run: steps, tokens, epochs or minutes, resolved to optimizer steps once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ultrathink.config.training import TrainingConfig
from ultrathink.core.durations import Duration
from ultrathink.training.endings import FINISHED, OUT_OF_TIME, Ending

# Share of a budget in minutes that is kept in reserve when it is converted to steps: the speed is
# measured over a few seconds only.
MARGIN = 0.03
_SAVING_S = 1.0  # reserved for the last checkpoint


@dataclass(frozen=True)
class Budget:
    """The length of a run, and the speed used to resolve durations in tokens or minutes."""

    total_steps: int
    tokens_per_step: int
    seconds_per_step: float = 0.0
    validation_s: float = 0.0  # cost of one validation
    is_settled: bool = True  # False while the measured pace may still correct the length
    looks: int = 0  # number of such checks so far

    @property
    def reserve_s(self) -> float:
        """Seconds of the minutes reserved for the last validation and checkpoint."""
        return _reserve_s(self.validation_s)

    def ending(self, step: int, elapsed_s: float, max_minutes: float | None) -> Ending | None:
        """Why a run ends after ``step``; None if steps and time are left."""
        if step >= self.total_steps:
            return FINISHED
        # Even the shortest run takes one step.
        if max_minutes is not None and step and elapsed_s >= max_minutes * 60 - self.reserve_s:
            return OUT_OF_TIME
        return None

    def steps(self, duration: Duration) -> int:
        """``duration`` in optimizer steps of this run."""
        return duration.to_steps(
            total_steps=self.total_steps,
            tokens_per_step=self.tokens_per_step,
            seconds_per_step=self.seconds_per_step,
        )


def is_over(state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the run of a checkpoint's ``state`` has used up its steps or minutes.

    ``config`` is the run's configuration as nested mappings; it is newer than the state if the run
    was extended and has not saved since. Raises LookupError, TypeError or ValueError if the state
    is not that of a run.
    """
    progress, training = state["progress"], config["training"]
    budget = Budget(**state["budget"])
    total = training.get("max_steps") or training.get("step_budget") or budget.total_steps
    ending = replace(budget, total_steps=total).ending(
        progress["step"], progress["elapsed_s"], training.get("max_minutes")
    )
    is_over = progress.get("is_over", False) and total <= budget.total_steps
    return is_over or (ending is not None and not ending.can_resume)


@dataclass(frozen=True)
class Speed:
    """The measured cost of a step, a validation and the evaluators, in seconds."""

    step_s: float = 0.0
    validation_s: float = 0.0
    elapsed_s: float = 0.0  # already spent on compilation and measuring
    evaluators_s: float = 0.0  # cost of the evaluators per step


@dataclass(frozen=True)
class Done:
    """Steps, tokens and samples already done, for a run whose length is resolved again."""

    step: int = 0
    tokens: int = 0
    samples: int = 0


def resolve_budget(
    training: TrainingConfig,
    *,
    tokens_per_step: int,
    samples_per_epoch: int,
    measure_speed: Callable[[], Speed],
    done: Done = Done(),
) -> Budget:
    """The budget of a run; the speed is measured only for lengths in minutes."""
    speed = Speed()
    if training.max_minutes is not None or _counts_minutes(training):
        speed = measure_speed()
    total = planned_steps(training, tokens_per_step, samples_per_epoch, done)
    if total is None:
        assert training.max_minutes is not None
        total = done.step + steps_within(training.max_minutes, speed, training.eval.every_steps)
    is_settled = training.max_minutes is None or training.step_budget is not None
    return Budget(max(1, total), tokens_per_step, speed.step_s, speed.validation_s, is_settled)


def planned_steps(
    training: TrainingConfig, tokens_per_step: int, samples_per_epoch: int, done: Done = Done()
) -> int | None:
    """The run's length in steps; None for minutes, which need the speed."""
    if training.step_budget is not None:
        return training.step_budget
    if training.max_steps is not None:
        return training.max_steps
    if training.max_tokens is not None:
        return done.step + math.ceil((training.max_tokens - done.tokens) / tokens_per_step)
    if training.epochs is not None:
        left = training.epochs * samples_per_epoch - done.samples
        return done.step + math.ceil(left / training.batch_size)
    return None


def steps_within(minutes: float, speed: Speed, eval_every: int | None) -> int:
    """Steps that fit into ``minutes``, less validations and a margin."""
    seconds = minutes * 60 * (1 - MARGIN) - speed.elapsed_s - _reserve_s(speed.validation_s)
    per_step = speed.step_s + (speed.validation_s / eval_every if eval_every else 0.0)
    per_step += speed.evaluators_s
    return max(1, math.floor(seconds / per_step))


def _reserve_s(validation_s: float) -> float:
    return 1.5 * validation_s + _SAVING_S


def _counts_minutes(training: TrainingConfig) -> bool:
    durations = (getattr(training.schedule, name, None) for name in ("warmup", "decay"))
    return any(isinstance(d, Duration) and d.unit == "minutes" for d in durations)
