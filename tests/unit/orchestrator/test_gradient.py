"""The norm of the gradient: explosion, slow growth and vanishing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import Floats, found, signals, watched


def norms(count: int, seed: int = 0) -> Floats:
    return np.exp(0.2 * np.random.default_rng(seed).standard_normal(count))


def test_a_healthy_norm_is_nothing() -> None:
    assert watched(signals({"grad_norm": norms(2000)})).events == []


@pytest.mark.parametrize(("times", "severity"), [(12, "medium"), (40, "high"), (6, "low")])
def test_a_norm_far_above_its_median_is_an_explosion(times: float, severity: str) -> None:
    values = norms(300)
    values[200] = times
    (event,) = found({"grad_norm": values}, "gradient_explosion")
    assert (event.step, event.found_at, event.severity) == (201, 201, severity)
    assert event.values["ratio"] == pytest.approx(times, rel=0.15)


def test_three_times_the_median_is_none() -> None:
    values = norms(300)
    values[200] = 3
    assert found({"grad_norm": values}, "gradient_explosion") == []


def test_an_explosion_that_lasts_is_one_event_and_grave() -> None:
    values = norms(300)
    values[200:210] *= 12
    (event,) = found({"grad_norm": values}, "gradient_explosion")
    assert (event.step, event.to_step, event.severity) == (201, 210, "high")


def test_a_new_level_counts_after_a_while() -> None:
    values = norms(400)
    values[200:] *= 12
    (event,) = found({"grad_norm": values}, "gradient_explosion")
    assert event.step == 201
    assert event.to_step < 260


def test_growth_that_no_step_shows_is_found_before_it_is_a_hundredfold() -> None:
    values = norms(1500)
    values[400:1400] *= np.geomspace(1, 100, 1000)
    values[1400:] *= 100
    event = found({"grad_norm": values}, "gradient_explosion")[0]
    assert event.severity in ("medium", "high")
    assert 800 < event.found_at < 1000  # ten times at step 900


def test_growth_by_five_is_how_norms_are() -> None:
    values = norms(3000) * np.geomspace(1, 5, 3000)
    assert found({"grad_norm": values}, "gradient_explosion") == []


def test_a_norm_that_all_but_disappears_is_vanishing() -> None:
    values = norms(300)
    values[200:] *= 0.01
    (event,) = found({"grad_norm": values}, "gradient_vanishing")
    assert (event.found_at, event.severity) == (205, "medium")


def test_a_few_small_norms_are_not() -> None:
    values = norms(300)
    values[200:204] *= 0.01
    values[250:] *= 0.1
    assert found({"grad_norm": values}, "gradient_vanishing") == []


def test_a_log_without_norms_has_zeros() -> None:
    assert watched(signals({"loss": [2.0] * 100, "grad_norm": [0.0] * 100})).events == []
