"""Depth routing: layers that starve or idle, frozen choices, predictors that are off."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import Columns, found, signals, watched

HEALTHY = {
    "capacity": 0.5,
    "selected": 0.5,
    "predicted": 0.5,
    "gate": 1.2,
    "always": 0.01,
    "never": 0.02,
    "agreement": 0.86,
}


def figures(count: int = 600, layer: int = 3, **changed: float) -> Columns:
    """Figures of a layer, of which some change halfway."""
    rng = np.random.default_rng(0)
    later = np.arange(count) >= count // 2
    columns = {}
    for name, usual in HEALTHY.items():
        noise = 0.0 if name == "capacity" else 0.02
        values = np.where(later, changed.get(name, usual), usual)
        columns[f"depth/{layer}/{name}"] = values * np.exp(noise * rng.standard_normal(count))
    return columns


def test_healthy_layers_are_nothing() -> None:
    assert watched(signals({**figures(), **figures(layer=5)})).events == []


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("depth_starved", {"predicted": 0.2}),
        ("depth_idle", {"gate": 0.05}),
        ("depth_frozen", {"always": 0.49, "never": 0.5}),
        ("predictor_off", {"agreement": 0.6}),
    ],
)
def test_what_lasts_some_steps_is_reported(kind: str, changed: dict[str, float]) -> None:
    columns = {**figures(**changed), **figures(layer=5)}
    events = found(columns, kind)
    assert [(e.severity, e.subject) for e in events] == [("medium", "layer 3")]
    assert (events[0].found_at, events[0].to_step) == (305, 600)
    assert {event.kind for event in watched(signals(columns)).events} == {kind}


@pytest.mark.parametrize(
    "changed",
    [{"predicted": 0.3}, {"gate": 0.2}, {"always": 0.4, "never": 0.4}, {"agreement": 0.7}],
)
def test_less_is_nothing(changed: dict[str, float]) -> None:
    assert watched(signals(figures(**changed))).events == []


def test_four_steps_and_a_young_router_are_nothing() -> None:
    columns = figures()
    columns["depth/3/predicted"][300:304] = 0.0
    columns["depth/3/agreement"][:199] = 0.5
    assert watched(signals(columns)).events == []


def test_a_layer_for_everyone_is_neither_frozen_nor_unpredicted() -> None:
    columns = figures(always=1.0, never=0.0)
    columns["depth/3/capacity"][:] = 1.0
    del columns["depth/3/agreement"], columns["depth/3/predicted"]
    assert watched(signals(columns)).events == []
