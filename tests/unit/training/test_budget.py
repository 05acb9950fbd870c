from typing import Any

import pytest

from ultrathink.config.training import TrainingConfig
from ultrathink.core.durations import Duration
from ultrathink.training.budget import Budget, Done, Speed, resolve_budget, steps_within


def resolved(speed: Speed | None = None, done: Done | None = None, **training: Any) -> Budget:
    """The budget of a run; without a ``speed`` it must not be measured."""

    def measure() -> Speed:
        assert speed is not None, "the speed must not be measured for this length"
        return speed

    config = TrainingConfig(batch_size=4, **training)
    sizes = {"tokens_per_step": 100, "samples_per_epoch": 40}
    return resolve_budget(config, **sizes, measure_speed=measure, done=done or Done())


DONE = Done(step=7, tokens=2250, samples=28)


@pytest.mark.parametrize(
    ("length", "done", "steps"),
    [
        ({"max_steps": 7}, Done(), 7),
        ({"max_tokens": 1001}, Done(), 11),
        ({"epochs": 1.5}, Done(), 15),
        ({"max_steps": 50}, DONE, 50),  # counted from the first step of the run
        ({"max_tokens": 3000}, DONE, 7 + 8),  # 750 of the tokens are left after 2,250
        ({"epochs": 2}, DONE, 7 + 13),  # 52 of 80 samples are left
    ],
)
def test_lengths_without_a_clock_are_exact(
    length: dict[str, float], done: Done, steps: int
) -> None:
    assert resolved(done=done, **length).total_steps == steps


def test_minutes_leave_room_for_validation_and_what_was_spent() -> None:
    speed = Speed(step_s=0.1, validation_s=5.0, elapsed_s=30.0)
    steps = steps_within(5.0, speed, eval_every=None)
    # 300 s less 3%, the 30 s spent, one and a half validations and a second for saving.
    assert steps == pytest.approx((291 - 30 - 7.5 - 1) / 0.1, abs=1)
    with_evals = steps_within(5.0, speed, eval_every=500)
    assert with_evals * (0.1 + 5.0 / 500) + 35.0 < 300


def test_minutes_are_resolved_once_from_the_measured_speed() -> None:
    speed = Speed(step_s=0.1, elapsed_s=29.0)
    assert resolved(speed, DONE, max_minutes=5).total_steps == 7 + 2610
    assert resolved(speed, max_minutes=5, step_budget=123).total_steps == 123
    warm_up = {"type": "cosine", "warmup": "1 minute"}
    budget = resolved(Speed(step_s=3.0), max_steps=100, schedule=warm_up)
    assert budget.steps(Duration.parse("1 minute")) == 20
