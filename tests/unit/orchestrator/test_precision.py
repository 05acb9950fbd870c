"""Loss scales of fp16 and steps that are left out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import found


def scales(count: int = 1000, window: int = 200) -> list[float]:
    """As it should be: halved at an overflow, doubled after so many steps without one."""
    scale, result = 65536.0, []
    for step in range(count):
        if step and step % window == 0:
            scale = scale * 2 if (step // window) % 2 else scale / 2
        result.append(scale)
    return result


def test_a_scale_that_goes_up_and_down_is_information() -> None:
    (event,) = found({"loss_scale": scales()}, "fp16_overflow")  # once, not at each of them
    assert event.severity == "info"
    assert found({"loss_scale": scales()}, "fp16_underflow") == []


def test_the_search_at_the_beginning_is_information() -> None:
    falling = [2.0 ** max(32 - step, 12) for step in range(300)]
    (event,) = found({"loss_scale": falling}, "fp16_overflow")
    assert event.severity == "info"
    assert "initial search" in event.message


def test_a_scale_far_below_its_usual_value_is_an_alarm() -> None:
    falling = scales(100, 1000) + [65536.0 / 2**step for step in range(1, 6)] + [2048.0] * 100
    (event,) = found({"loss_scale": falling}, "fp16_overflow")
    assert (event.step, event.severity) == (101, "medium")
    assert event.values["loss_scale"] <= 65536 / 8


def test_a_scale_of_one_is_underflow() -> None:
    falling = scales(100, 1000) + [65536.0 / 2**step for step in range(1, 17)]
    (event,) = found({"loss_scale": falling}, "fp16_underflow")
    assert (event.step, event.severity) == (116, "high")


@pytest.mark.parametrize(
    ("share", "severities"), [(0.02, {"info"}), (0.4, {"medium", "high"}), (0.8, {"high"})]
)
def test_many_steps_left_out_are_an_alarm(share: float, severities: set[str]) -> None:
    rng = np.random.default_rng(0)
    skipped = np.cumsum(np.where(np.arange(400) > 200, rng.random(400) < share, 0))
    events = found({"skipped_steps": skipped}, "skipped_steps")
    assert events
    assert {event.severity for event in events} <= severities


def test_steps_left_out_at_the_beginning_and_counts_again_are_no_alarm() -> None:
    events = found({"skipped_steps": np.minimum(np.arange(300), 20)}, "skipped_steps")
    assert {event.severity for event in events} == {"info"}
    again = np.where(np.arange(300) < 150, 40, 0)
    assert found({"skipped_steps": again}, "skipped_steps") == []
