"""Overfitting, forgetting and accuracies that drop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import found, law, signals, watched
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.signals import Signals


def validated(
    losses: Sequence[float], every: int = 25, *, train_falls: bool = True
) -> list[Signals]:
    """Training steps with a validation after every so many, as a part of its own."""
    run = []
    for number, loss in enumerate(losses):
        for step in range(number * every + 1, (number + 1) * every + 1):
            train = 3 - 0.001 * step if train_falls else 3 + 0.001 * step
            run.append(Signals(step, {"loss": train}))
        run.append(Signals((number + 1) * every, {"val_loss": loss}))
    return run


def overfitting(run: list[Signals]) -> list[Event]:
    return [event for event in watched(run).events if event.kind == "overfitting"]


U_SHAPE = [2.0, 1.6, 1.3, 1.15, 1.1, 1.12, 1.17, 1.25, 1.35, 1.5]


def test_a_validation_loss_that_rises_is_one_event_of_overfitting() -> None:
    (event,) = overfitting(validated(U_SHAPE))
    assert event.severity == "high"
    assert event.step == 5 * 25 + 1  # after its best
    assert event.found_at <= 8 * 25
    assert event.to_step == 250
    assert event.values["best"] == 1.1


def test_a_little_is_less_grave() -> None:
    (event,) = overfitting(validated([1.6, 1.3, 1.15, 1.1, 1.11, 1.125, 1.14, 1.155, 1.17, 1.18]))
    assert event.severity == "medium"


def test_where_the_training_loss_rises_too_it_is_something_else() -> None:
    assert overfitting(validated(U_SHAPE, train_falls=False)) == []


def test_two_worse_validations_or_a_flat_end_are_none() -> None:
    assert overfitting(validated([2.0, 1.6, 1.3, 1.15, 1.1, 1.2, 1.25, 1.09])) == []
    assert overfitting(validated([2.0, 1.6, 1.3, 1.15, 1.1, 1.101, 1.102, 1.103, 1.104])) == []


def test_noisy_validations_are_none() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        losses = law(60, floor=2.2) + 0.05 * rng.standard_normal(60)
        assert overfitting(validated(losses.tolist(), every=5)) == []


def test_a_source_that_rises_while_another_falls_is_forgotten() -> None:
    rng = np.random.default_rng(0)
    noise = np.exp(0.03 * rng.standard_normal((2, 640)))
    rise = np.linspace(0, 0.6, 640) * (np.arange(640) > 320)
    columns = {"loss/web": law(640) * noise[0], "loss/code": 1.5 * np.exp(rise) * noise[1]}
    (event,) = found(columns, "forgetting")
    assert (event.subject, event.severity) == ("code", "medium")
    assert 320 < event.found_at < 500
    assert "web" in event.message


def test_validations_of_sources_count_one_by_one() -> None:
    run = []
    for number in range(12):
        code = 1.0 if number < 6 else 1.0 + 0.1 * (number - 5)
        values = {"val_loss/web": 3 - 0.1 * number, "val_loss/code": code}
        run += [Signals(number * 10 + step, {"loss": 2.0}) for step in range(9)]
        run.append(Signals(number * 10 + 9, values))
    (event,) = (event for event in watched(run).events if event.kind == "forgetting")
    assert event.subject == "code"
    assert event.to_step == 119


def test_sources_that_rise_together_or_a_little_are_not_forgotten() -> None:
    rng = np.random.default_rng(0)
    noise = np.exp(0.03 * rng.standard_normal((2, 640)))
    rise = np.exp(np.linspace(0, 0.5, 640))
    assert found({"loss/web": rise * noise[0], "loss/code": rise * noise[1]}, "forgetting") == []
    little = np.exp(np.linspace(0, 0.03, 640))
    columns = {"loss/web": law(640) * noise[0], "loss/code": little * noise[1]}
    assert found(columns, "forgetting") == []


@pytest.mark.parametrize("name", ["accuracy", "val_accuracy"])
def test_an_accuracy_that_falls_and_stays_is_reported(name: str) -> None:
    rng = np.random.default_rng(0)
    accuracy = 0.8 + 0.01 * rng.standard_normal(120)
    accuracy[80:] = 0.4
    (event,) = found({name: accuracy}, "accuracy_drop")
    assert (event.found_at, event.severity, event.subject) == (82, "medium", name)
    assert event.to_step < 120  # then the new level counts


def test_one_low_accuracy_and_a_slow_fall_are_none() -> None:
    rng = np.random.default_rng(0)
    accuracy = 0.8 + 0.01 * rng.standard_normal(120)
    accuracy[80] = 0.3
    assert found({"accuracy": accuracy}, "accuracy_drop") == []
    accuracy = 0.8 + 0.01 * rng.standard_normal(120) - 0.0005 * np.arange(120)
    assert watched(signals({"accuracy": accuracy})).events == []
