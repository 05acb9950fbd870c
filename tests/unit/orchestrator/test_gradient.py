"""The norm of the gradient: explosion, slow growth and vanishing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import Floats, found, signals, watched


def norms(count: int, seed: int = 0) -> Floats:
    return np.exp(0.2 * np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize(("times", "severity"), [(12, "medium"), (40, "high"), (6, "low")])
def test_a_norm_far_above_its_median_is_an_explosion(times: float, severity: str) -> None:
    values = norms(300)
    values[200] = times
    (event,) = found({"grad_norm": values}, "gradient_explosion")
    assert (event.step, event.found_at, event.severity) == (201, 201, severity)
    assert event.values["ratio"] == pytest.approx(times, rel=0.15)


STEPS = np.arange(3000)


@pytest.mark.parametrize(
    ("factors", "kind"),
    [
        (np.where(STEPS == 200, 3.0, 1.0), "gradient_explosion"),
        (np.geomspace(1, 5, 3000), "gradient_explosion"),
        (np.where((STEPS >= 200) & (STEPS < 204), 0.01, 1.0), "gradient_vanishing"),
        (np.where(STEPS >= 250, 0.1, 1.0), "gradient_vanishing"),
    ],
    ids=["three times the median", "growth by five", "a few small ones", "a tenth"],
)
def test_this_is_how_norms_are(factors: Floats, kind: str) -> None:
    assert found({"grad_norm": norms(3000) * factors}, kind) == []


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


def test_a_norm_that_all_but_disappears_is_vanishing() -> None:
    values = norms(300)
    values[200:] *= 0.01
    (event,) = found({"grad_norm": values}, "gradient_vanishing")
    assert (event.found_at, event.severity) == (205, "medium")


def of_layers(count: int, *shares: Floats | float) -> dict[str, Floats]:
    """The norms of a gradient and of its layers, which have ``shares`` of it."""
    total = norms(count)
    noise = np.random.default_rng(1).standard_normal((len(shares), count))
    layers = {
        f"grad_norm/layer_{number}": total * share * np.exp(0.1 * one)
        for number, (share, one) in enumerate(zip(shares, noise, strict=True))
    }
    return {"grad_norm": total, **layers}


def test_a_layer_that_stops_learning_is_found_whatever_the_others_do() -> None:
    share = np.full(300, 0.3)
    share[200:] = 0.02
    (event,) = found(of_layers(300, 0.9, share), "layer_vanishing")
    assert (event.subject, event.severity) == ("layer_1", "high")
    assert (event.step, event.found_at) == (201, 203)
    assert event.values["usual_share"] == pytest.approx(0.3, rel=0.1)


def test_a_layer_of_zeros_is_found_and_its_new_share_counts_after_a_while() -> None:
    share = np.full(400, 0.3)
    share[200:] = 0.0
    (event,) = found(of_layers(400, 0.9, share), "layer_vanishing")
    assert event.to_step < 240


def test_what_lies_between_two_logged_steps_may_be_the_cause() -> None:
    share = np.full(100, 0.3)
    share[50:] = 0.0
    run = signals(of_layers(100, 0.9, share), every=10, start=10)
    (event,) = [one for one in watched(run).events if one.kind == "layer_vanishing"]
    assert (event.step, event.found_at) == (501, 530)


@pytest.mark.parametrize(
    "share",
    [
        np.geomspace(0.3, 0.04, 3000),
        np.geomspace(0.3, 1.0, 3000),
        np.where((STEPS == 200) | (STEPS == 201), 0.001, 0.3),
    ],
    ids=["falls slowly", "rises slowly", "two small ones"],
)
def test_this_is_how_shares_of_layers_are(share: Floats) -> None:
    assert found(of_layers(3000, 0.9, share), "layer_vanishing") == []


def test_after_a_rewind_beyond_all_that_is_usual_nothing_is_found() -> None:
    watcher = watched(signals(of_layers(300, 0.9, 0.3), start=1000), end=False)
    watcher.rewind(900)
    for one in signals(of_layers(100, 0.9, 0.001), start=901):
        watcher.observe(one)
    assert [event for event in watcher.events if event.kind == "layer_vanishing"] == []


def test_a_log_without_norms_has_zeros() -> None:
    assert watched(signals({"loss": [2.0] * 100, "grad_norm": [0.0] * 100})).events == []
