"""The baselines do what their sources say; compared with the sources' formulas, written plainly."""

import math

import numpy as np
import pytest

from tests.unit.benchmarks.conftest import BENCHMARKS

# isort: split
from fault_parts import controller_of

CONTROLLERS = BENCHMARKS / "fault_controllers"


def norms(num_steps: int = 300) -> list[float]:
    values = np.random.default_rng(0).lognormal(0.0, 0.2, num_steps)
    values[[100, 101, 180, 250]] = 8.0, 3.0, 40.0, 0.01
    return [float(value) for value in values]


def test_zclip_is_the_algorithm_of_the_paper() -> None:
    """Algorithm 1 of arXiv:2504.02507, with reciprocal clipping, written again in ten lines."""
    guard = controller_of(CONTROLLERS / "zclip.py")()
    values = norms()
    mean, variance = np.mean(values[:25]), np.var(values[:25])
    clips = [guard.judge(2.0, value).clip for value in values]
    assert clips[:25] == [None] * 25
    for value, clip in zip(values[25:], clips[25:], strict=True):
        z = (value - mean) / (math.sqrt(variance) + 1e-6)
        kept = value
        if z > 2.5:
            kept = mean + 2.5 * math.sqrt(variance) / (z / 2.5)
            assert clip == pytest.approx(kept)
        else:
            assert clip is None
        mean = 0.97 * mean + 0.03 * kept
        variance = 0.97 * variance + 0.03 * (kept - mean) ** 2
    assert {100, 180} <= {step for step, clip in enumerate(clips) if clip is not None}
    assert clips[180] == pytest.approx(mean, rel=0.5)  # the farther out, the nearer to the mean


def test_skip_step_leaves_out_what_lies_six_sigma_off() -> None:
    guard = controller_of(CONTROLLERS / "skip_step.py")()
    values = norms()
    losses = list(np.random.default_rng(1).normal(2.0, 0.05, len(values)))
    losses[220] = 3.0
    skipped = [
        step
        for step, (loss, norm) in enumerate(zip(losses, values, strict=True))
        if guard.judge(loss, norm).skip
    ]
    expected = []
    for step in range(63, len(values)):
        for series in (losses, values):
            before = series[max(0, step - 128) : step]
            if abs(series[step] - np.mean(before)) > 6 * np.std(before, ddof=1):
                expected.append(step)
    assert skipped == sorted(set(expected))
    assert {100, 180, 220} <= set(skipped)


def test_skip_step_takes_the_deviation_of_a_sample() -> None:
    """With n - 1 below the line, as the source's ``torch.std_mean`` does."""
    before = [float(number % 2) for number in range(63)]
    mean = np.mean(before)
    for deviation, expected in ((np.std(before), False), (np.std(before, ddof=1), True)):
        guard = controller_of(CONTROLLERS / "skip_step.py")()
        for norm in before:
            guard.judge(2.0, norm)
        assert guard.judge(2.0, float(mean + 6.001 * deviation)).skip is expected


def test_fixed_clip_says_the_same_to_all() -> None:
    guard = controller_of(CONTROLLERS / "fixed_clip.py")()
    assert [guard.judge(2.0, norm).clip for norm in (0.1, 10.0)] == [1.0, 1.0]


def test_none_has_nothing_to_say() -> None:
    none = controller_of(CONTROLLERS / "none.py")()
    assert not hasattr(none, "judge")
    assert not hasattr(none, "at_boundary")


@pytest.mark.parametrize("name", ["zclip", "skip_step"])
def test_a_guard_continues_from_its_state(name: str) -> None:
    make = controller_of(CONTROLLERS / f"{name}.py")
    values = norms()
    for cut in (10, 150):
        whole, first, second = make(), make(), make()
        expected = [whole.judge(2.0 + value / 100, value) for value in values]
        got = [first.judge(2.0 + value / 100, value) for value in values[:cut]]
        second.load_state_dict(first.state_dict())
        got += [second.judge(2.0 + value / 100, value) for value in values[cut:]]
        assert got == expected
