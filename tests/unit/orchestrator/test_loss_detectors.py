"""Hard batches, spikes, divergence and values that are no numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import (
    found,
    law,
    signals,
    steady,
    watched,
)
from ultrathink.orchestrator.detectors.loss import LossSpike
from ultrathink.orchestrator.signals import Signals


@pytest.mark.parametrize(("times", "severity"), [(1.3, "info"), (4.0, "low")])
def test_one_step_far_out_is_a_hard_batch_and_no_alarm(times: float, severity: str) -> None:
    loss = steady(400)
    loss[300] *= times
    (event,) = watched(signals({"loss": loss})).events
    assert (event.kind, event.severity) == ("hard_batch", severity)
    assert (event.step, event.found_at) == (301, 302)
    assert event.values["loss"] == pytest.approx(loss[300])
    assert event.values["score"] > 6


@pytest.mark.parametrize(("size", "severity"), [(1.15, "medium"), (1.8, "high")])
def test_a_jump_that_lasts_a_few_steps_is_a_spike(size: float, severity: str) -> None:
    loss = steady(400)
    loss[300:306] *= 1 + (size - 1) * np.array([1, 0.9, 0.7, 0.5, 0.4, 0.3])
    (event,) = found({"loss": loss}, "loss_spike")
    assert (event.step, event.severity) == (301, severity)
    assert event.found_at <= 303
    assert 304 <= event.to_step <= 308
    assert event.values["level"] == pytest.approx(law(400)[300], rel=0.05)


def test_two_neighbours_a_little_out_are_no_alarm() -> None:
    loss = steady(400)
    loss[300:302] = law(400)[300:302] * 1.085
    (event,) = watched(signals({"loss": loss})).events
    assert event.severity in ("info", "low")


def test_a_spike_is_found_again_and_does_not_hide_the_next() -> None:
    loss = steady(900)
    for step in (300, 360, 420, 480, 540):
        loss[step : step + 5] *= 1.3
    found_at = [event.step for event in found({"loss": loss}, "loss_spike")]
    assert found_at == [301, 361, 421, 481, 541]


def test_a_loss_that_stays_high_has_diverged_and_its_new_level_is_what_counts() -> None:
    loss = steady(900)
    loss[300:] *= 1.7
    loss[400:405] *= 1.3  # as found as if there had been no divergence
    events = watched(signals({"loss": loss})).events
    spike, divergence, other = sorted(events, key=lambda event: event.found_at)
    kinds = [(event.kind, event.step) for event in (spike, divergence, other)]
    assert kinds == [("loss_spike", 301), ("divergence", 301), ("loss_spike", 401)]
    assert divergence.severity == "critical"
    assert divergence.found_at <= 301 + 24
    assert divergence.to_step < 450
    assert spike.to_step < 400
    assert other.values["level"] == pytest.approx(1.7 * law(900)[400], rel=0.05)
    detector = LossSpike()
    found = [one for each in signals({"loss": loss[:400]}) for one in detector.observe(each)]
    assert [one.kind for one in found].count("divergence") == 1
    assert found[-1].step <= 301 + 24  # nothing is said of the new level


def test_a_slow_rise_is_a_divergence() -> None:
    loss = steady(1000, share=0.02)
    loss[500:] *= np.exp(0.0015 * np.arange(500))
    (event,) = found({"loss": loss}, "divergence")
    assert event.severity == "high"
    assert event.found_at < 501 + 150
    assert event.to_step > 980
    assert event.values["loss"] > event.values["best"]


def test_a_rise_of_four_percent_is_none() -> None:
    loss = 3 * np.exp(0.002 * np.random.default_rng(0).standard_normal(1000))
    loss[500:] *= np.linspace(1, 1.04, 500)
    assert found({"loss": loss}, "divergence") == []
    loss[500:] *= np.linspace(1, 1.04, 500)
    assert [event.severity for event in found({"loss": loss}, "divergence")] == ["medium"]


def test_a_loss_above_that_of_the_start_needs_no_long_baseline() -> None:
    loss = np.array([11.1, 7.1, 4.0, 36.0, 24.2, 26.5, 20.7, 27.5, 21.5, 4.9, 8.5])
    (event,) = found({"loss": loss}, "divergence")
    assert (event.step, event.found_at, event.severity) == (4, 6, "high")
    assert event.values == {"loss": pytest.approx(36.0), "start": pytest.approx(11.1)}


def test_what_is_too_small_or_the_end_of_the_warm_up_is_nothing() -> None:
    steady_one = steady(400, share=0.0005)
    steady_one[300:310] *= 1.008
    warm_up = law(1000) * (1 + 0.05 * np.exp(-(((np.arange(1000) - 200) / 60) ** 2)))
    for loss in (steady_one, warm_up):
        assert watched(signals({"loss": loss})).events == []


@pytest.mark.parametrize(
    ("last", "kind", "severity"),
    [
        ([*steady(400), steady(400)[-1] * 1.2], "loss_spike", "low"),
        ([*steady(400), steady(400)[-1] * 3], "loss_spike", "medium"),
        ([3.0, 3.1, 3.05, 7.7], "divergence", "low"),
        ([3.0, 3.1, 3.05, 7.7, 7.2], "divergence", "medium"),
        ([3.0, 3.1, 3.05, 7.7, 3.1, 7.7, 3.0], "divergence", None),
    ],
)
def test_the_end_of_a_log_is_reported_by_size(
    last: list[float], kind: str, severity: str | None
) -> None:
    assert [event.severity for event in found({"loss": last}, kind)][:1] == [severity] * bool(
        severity
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    loss = steady(50)
    loss[30] = value
    (event,) = watched(signals({"loss": loss})).events
    assert (event.kind, event.severity) == ("non_finite", "high")
    assert (event.step, event.subject) == (31, "loss")


def test_a_loss_that_is_nan_for_good_is_one_critical_event() -> None:
    loss = steady(80)
    loss[30:] = math.nan
    (event,) = watched(signals({"loss": loss})).events
    assert (event.severity, event.step, event.to_step) == ("critical", 31, 80)
    assert event.values == {"in_a_row": 3.0}


def test_an_overflow_under_a_loss_scale_is_as_it_should_be() -> None:
    def severities(*, scaled: bool, times: int) -> list[str]:
        run = []
        for step in range(20):
            values = {"loss": 2.0, "grad_norm": math.inf if step in range(5, 5 + times) else 1.0}
            run.append(Signals(step, values | ({"loss_scale": 1024.0} if scaled else {})))
        return [event.severity for event in watched(run).events]

    assert severities(scaled=True, times=1) == ["info"]
    assert severities(scaled=False, times=1) == ["high"]
    assert severities(scaled=True, times=4) == ["critical"]
