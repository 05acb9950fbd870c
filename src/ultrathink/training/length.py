"""A length in minutes: the speed that turns it into steps, and its correction later on."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ultrathink.training.budget import Budget, Speed, steps_within
from ultrathink.training.control import Change
from ultrathink.training.hardware import synchronize
from ultrathink.training.run_state import return_to

if TYPE_CHECKING:
    from ultrathink.training.trainer import Trainer

# Steps timed to turn minutes into steps: this share of the run's minutes, and at least so many.
TRIAL_SHARE = 0.004
_TRIAL_MIN_STEPS = 5
# What was timed at the start may have been a bad moment of a busy machine: once these shares of the
# minutes are over, the pace of real steps counts, if it gives a length that differs by this factor.
_LOOKS = (0.1, 0.3, 0.5, 0.7)
_SETTLED_WITHIN = 1.05


def measure_speed(trainer: Trainer) -> Speed:
    """Time a few real steps and a piece of validation, then undo them."""
    before = trainer.copied_state()
    trial_s = (trainer.training.max_minutes or 0.0) * 60 * TRIAL_SHARE
    stepper, loader, world = trainer.stepper, trainer.loader, trainer.world
    stepper.allocate_state()  # after the copy, which would hold its zeros twice

    def take_step() -> None:
        batch = trainer.objective.prepare(loader.next_batch(), trainer.progress.step + 1)
        stepper.take_step(batch, trainer.settings, 0.0)

    take_step()  # compiles
    step_s: list[float] = []
    while len(step_s) < _TRIAL_MIN_STEPS or world.of_main(sum(step_s)) < trial_s:
        began = time.perf_counter()
        take_step()
        synchronize(trainer.device)
        step_s.append(time.perf_counter() - began)
    validation_s = estimate_validation(trainer)
    return_to(trainer, before)
    return Speed(
        step_s=world.of_main(sum(step_s) / len(step_s)),
        validation_s=validation_s,
        elapsed_s=world.of_main(trainer.elapsed_s()),
    )


def estimate_validation(trainer: Trainer) -> float:
    """Seconds that a whole validation will take, from three batches of it."""
    if trainer.held_out is None:
        return 0.0
    trainer.score(trainer.held_out, max_batches=1)  # the first pays for fresh memory
    began = time.perf_counter()
    scores = trainer.score(trainer.held_out, max_batches=3)
    num_tokens, _ = trainer.held_out.extent(trainer.training.eval.max_tokens)
    seconds = trainer.world.of_main(time.perf_counter() - began)
    return seconds * num_tokens / max(1, scores.num_tokens)


def settle_length(trainer: Trainer) -> None:
    """Correct a length in minutes where real steps are not as fast as was thought, or were undone.

    That is looked at four times, and after each time that the run went back.
    """
    minutes, budget, progress = trainer.training.max_minutes, trainer.budget, trainer.progress
    assert budget is not None
    if minutes is None or budget.is_settled or trainer.ending is not None:
        return
    looks = sum(trainer.elapsed_s() >= share * minutes * 60 for share in _LOOKS)
    if looks <= budget.looks and progress.step < budget.total_steps:
        return
    is_settled = looks == len(_LOOKS)
    num_steps, seconds = trainer.paced
    speed = Speed(seconds / num_steps, estimate_validation(trainer), trainer.elapsed_s())
    total = progress.step + steps_within(minutes, speed, trainer.training.eval.every_steps)
    corrected = Budget(
        total, trainer.tokens_per_step, speed.step_s, speed.validation_s, is_settled, looks
    )
    is_over = trainer.elapsed_s() >= minutes * 60 - corrected.reserve_s
    differs = max(total, budget.total_steps) > _SETTLED_WITHIN * min(total, budget.total_steps)
    if is_over or not differs:
        trainer.budget = replace(budget, is_settled=is_settled, looks=looks)
        return
    trainer.set_budget(corrected)
    slower = speed.step_s / max(budget.seconds_per_step, 1e-9)
    reason = f"a step takes {speed.step_s:.3g} s, not {budget.seconds_per_step:.3g}"
    if 1 / _SETTLED_WITHIN < slower < _SETTLED_WITHIN:
        reason = "steps were taken twice, and the minutes are what they were"
    change = Change(progress.step, "training.step_budget", budget.total_steps, total, reason)
    trainer.notify("on_change", change)
    trainer.notify("on_budget", total)
