import pytest

from ultrathink.config.training import TrainingConfig
from ultrathink.training.budget import Budget, Done, Speed, resolve_budget, steps_within


def never() -> Speed:
    raise AssertionError("the speed must not be measured for this length")


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"max_steps": 7}, 7), ({"max_tokens": 1001}, 11), ({"epochs": 1.5}, 15)],
)
def test_lengths_without_a_clock_are_exact(length: dict[str, float], steps: int) -> None:
    training = TrainingConfig(batch_size=4, **length)
    budget = resolve_budget(
        training, tokens_per_step=100, samples_per_epoch=40, measure_speed=never
    )
    assert budget.total_steps == steps


def test_minutes_leave_room_for_validation_and_what_was_spent() -> None:
    speed = Speed(step_s=0.1, validation_s=5.0, elapsed_s=30.0)
    steps = steps_within(5.0, speed, eval_every=None)
    # 300 s less 3%, the 30 s spent, one and a half validations and a second for saving.
    assert steps == pytest.approx((291 - 30 - 7.5 - 1) / 0.1, abs=1)
    with_evals = steps_within(5.0, speed, eval_every=500)
    assert with_evals * (0.1 + 5.0 / 500) + 35.0 < 300


def test_recorded_step_budget_wins_over_the_clock() -> None:
    training = TrainingConfig(max_minutes=5, step_budget=123)
    budget = resolve_budget(
        training,
        tokens_per_step=100,
        samples_per_epoch=40,
        measure_speed=lambda: Speed(0.1, 0.0, 0.0),
    )
    assert budget.total_steps == 123


def test_a_warmup_in_minutes_needs_the_speed() -> None:
    training = TrainingConfig(max_steps=100, schedule={"type": "cosine", "warmup": "1 minute"})
    budget = resolve_budget(
        training,
        tokens_per_step=100,
        samples_per_epoch=40,
        measure_speed=lambda: Speed(step_s=3.0),
    )
    assert budget.steps(training.schedule.warmup) == 20


def test_budget_survives_a_round_trip() -> None:
    budget = Budget(10, 20, 0.5, 3.0)
    assert Budget(**budget.to_dict()) == budget  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_steps": 50}, 50),  # counted from the first step of the run
        ({"max_tokens": 3000}, 7 + 8),  # 750 of the tokens are left after 2,250
        ({"epochs": 2}, 7 + 13),  # 52 of 80 samples are left
        ({"max_minutes": 5}, 7 + 2610),
    ],
)
def test_what_lies_behind_a_run_is_taken_off_its_length(
    length: dict[str, float], steps: int
) -> None:
    budget = resolve_budget(
        TrainingConfig(batch_size=4, **length),
        tokens_per_step=100,
        samples_per_epoch=40,
        measure_speed=lambda: Speed(step_s=0.1, validation_s=0.0, elapsed_s=29.0),
        done=Done(step=7, tokens=2250, samples=28),
    )
    assert budget.total_steps == steps
