"""The time left: not before there is evidence, and right when the pace changes."""

import pytest

from tests.unit.monitoring.screens import Clock
from ultrathink.monitoring.console import Pace


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock)


def run(pace: Pace, clock: Clock, first: int, last: int, seconds: float) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        pace.update(step)


def test_nothing_is_claimed_without_evidence(pace: Pace, clock: Clock) -> None:
    assert pace.seconds_left(100) is None
    clock.now = 60.0
    pace.update(1)
    assert pace.seconds_left(100) is None
    run(pace, clock, 2, 10, 0.1)
    assert pace.seconds_left(100) is None  # less than two seconds seen


def test_the_first_step_which_compiles_does_not_count(pace: Pace, clock: Clock) -> None:
    clock.now = 500.0
    pace.update(1)
    run(pace, clock, 2, 101, 0.1)
    assert pace.seconds_per_step() == pytest.approx(0.1)
    assert pace.seconds_left(201) == pytest.approx(10.0)


def test_time_goes_by_between_steps(pace: Pace, clock: Clock) -> None:
    run(pace, clock, 1, 11, 10.0)
    clock.now += 4
    assert pace.seconds_left(21) == pytest.approx(96.0)
    clock.now += 1e6
    assert pace.seconds_left(21) == 0.0


def test_pauses_count_in_their_share(pace: Pace, clock: Clock) -> None:
    for block in range(20):  # every 10 seconds of steps a validation of 10 seconds
        run(pace, clock, block * 100 + 1, block * 100 + 100, 0.1)
        clock.now += 10
    assert pace.seconds_per_step() == pytest.approx(0.2, rel=0.15)


def test_a_new_pace_is_believed_after_its_window(pace: Pace, clock: Clock) -> None:
    run(pace, clock, 1, 100, 1.0)
    run(pace, clock, 101, 1100, 0.1)
    assert pace.seconds_per_step() == pytest.approx(0.1, rel=0.01)


def test_a_long_run_is_remembered_in_few_points(pace: Pace, clock: Clock) -> None:
    run(pace, clock, 1, 50_000, 0.05)
    assert len(pace._points) < 420
    assert pace.seconds_per_step() == pytest.approx(0.05, rel=0.01)
