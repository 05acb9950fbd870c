"""How long a run is: any length given by the user, resolved to optimizer steps once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ultrathink.config.training import TrainingConfig
from ultrathink.core.durations import Duration
from ultrathink.training.endings import FINISHED, OUT_OF_TIME, Ending

# Of a budget in minutes, this share is left unused when it is turned into steps: the speed is
# measured over a few seconds and holds only roughly for the minutes that follow.
MARGIN = 0.03
# What the last checkpoint may take.
_SAVING_S = 1.0


@dataclass(frozen=True)
class Budget:
    """The length of a run, and the speed that durations in tokens or minutes are resolved with."""

    total_steps: int
    tokens_per_step: int
    seconds_per_step: float = 0.0
    validation_s: float = 0.0  # what one validation costs
    is_settled: bool = True  # False while the pace of real steps may still correct it
    looks: int = 0  # how often that was looked at

    @property
    def reserve_s(self) -> float:
        """Seconds kept free at the end of the minutes, for the last validation and checkpoint."""
        return _reserve_s(self.validation_s)

    def ending(self, step: int, elapsed_s: float, max_minutes: float | None) -> Ending | None:
        """Why a run ends after ``step``, None where steps and time are left."""
        if step >= self.total_steps:
            return FINISHED
        # However short its time, a run takes one step.
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

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def is_over(state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the run of a checkpoint's state has used up its steps or its minutes.

    ``config`` is the run's configuration as nested mappings, newer than the state where the run was
    made longer and has not saved since. Raises LookupError, TypeError or ValueError where the state
    is not a run's.
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
    """What a step, a validation and a checkpoint cost here, in seconds."""

    step_s: float = 0.0
    validation_s: float = 0.0
    elapsed_s: float = 0.0  # spent already, on compilation and on measuring
    evaluators_s: float = 0.0  # what evaluators cost, spread over the steps


@dataclass(frozen=True)
class Done:
    """What lies behind a run whose length is resolved anew: steps, tokens, samples of its data."""

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
    """The budget of a run; the speed is measured only where a length in minutes needs it."""
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
    """The run's length in steps as far as it is known before its speed is; None for minutes."""
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
    """Steps that fit into ``minutes``, validations and a margin taken off."""
    seconds = minutes * 60 * (1 - MARGIN) - speed.elapsed_s - _reserve_s(speed.validation_s)
    per_step = speed.step_s + (speed.validation_s / eval_every if eval_every else 0.0)
    per_step += speed.evaluators_s
    return max(1, math.floor(seconds / per_step))


def _reserve_s(validation_s: float) -> float:
    return 1.5 * validation_s + _SAVING_S


def _counts_minutes(training: TrainingConfig) -> bool:
    durations = (getattr(training.schedule, name, None) for name in ("warmup", "decay"))
    return any(isinstance(d, Duration) and d.unit == "minutes" for d in durations)
