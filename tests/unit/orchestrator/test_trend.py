"""Plateaus and oscillation of the training loss."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import Floats, found, steady


def falling(count: int, stop: int, share: float = 0.003, seed: int = 0) -> Floats:
    """Falls by 0.2% a step until it stops."""
    level = 4 * np.exp(-0.002 * np.minimum(np.arange(count), stop))
    noise: Floats = level * np.exp(share * np.random.default_rng(seed).standard_normal(count))
    return noise


def test_a_fall_that_stops_is_a_plateau() -> None:
    (event,) = found({"loss": falling(500, 300)}, "plateau")
    assert event.severity == "medium"
    assert 310 <= event.found_at <= 300 + 72
    assert event.values["fell"] > 0.03


STEPS = np.arange(500)
NOISE = np.random.default_rng(0).standard_normal(500)


@pytest.mark.parametrize(
    "loss",
    [
        falling(500, 500),
        steady(3000, share=0.003),
        4 * np.exp(-0.002 * np.minimum(STEPS, 300) - 0.0006 * np.maximum(STEPS - 300, 0)),
        2.7 + 0.08 * np.maximum(32 - STEPS, 0) + 0.01 * NOISE,
        np.where(STEPS < 200, 2.0, 1.5) * np.exp(0.014 * NOISE),
    ],
    ids=["continues", "a power law", "slows down", "the first of a run", "at once"],
)
def test_another_fall_is_no_plateau(loss: Floats) -> None:
    assert found({"loss": loss}, "plateau") == []


def test_a_plateau_says_where_the_rate_was_lowered() -> None:
    rate = np.where(np.arange(500) < 300, 1e-3, 1e-4)
    (event,) = found({"loss": falling(500, 300), "lr": rate}, "plateau")
    assert "learning rate" in event.message


@pytest.mark.parametrize("period", [2, 6, 16])
def test_a_wide_regular_swing_is_an_oscillation(period: int) -> None:
    rng = np.random.default_rng(0)
    loss = 3 * np.exp(0.01 * rng.standard_normal(600))
    loss[300:] *= np.exp(0.06 * np.sin(2 * np.pi * (np.arange(300) + 0.5) / period))
    events = found({"loss": loss}, "oscillation")
    assert events[0].severity == "medium"
    assert events[0].found_at <= 301 + 80
    assert events[0].values["period"] == pytest.approx(period, abs=2)


def test_wider_noise_and_a_narrow_swing_are_none() -> None:
    rng = np.random.default_rng(0)
    wider = 3 * np.exp(0.01 * rng.standard_normal(600) * np.where(np.arange(600) < 300, 1, 6))
    assert found({"loss": wider}, "oscillation") == []
    narrow = 3 * np.exp(0.01 * rng.standard_normal(600))
    narrow[300:] *= np.exp(0.01 * np.sin(np.arange(300)))
    assert found({"loss": narrow}, "oscillation") == []


def test_a_rate_that_is_lost_at_once_is_a_plateau() -> None:
    steps = np.arange(300)
    lost = np.where(steps < 150, 1e-3, 1e-5)
    (event,) = found({"lr": lost}, "plateau")
    assert (event.step, event.found_at, event.severity) == (151, 166, "medium")
    assert event.values == {"lr": 1e-5, "before": 1e-3}


@pytest.mark.parametrize(
    "rates",
    [
        np.where(STEPS < 150, 1e-3, 1e-4),
        1e-3 * (1 - STEPS / 501),
        np.where((STEPS > 150) & (STEPS < 160), 1e-6, 1e-3),
    ],
    ids=["a tenth", "linear", "for ten steps"],
)
def test_schedules_and_short_losses_of_the_rate_are_none(rates: Floats) -> None:
    assert found({"lr": rates}, "plateau") == []
