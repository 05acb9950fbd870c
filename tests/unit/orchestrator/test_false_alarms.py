"""Healthy runs of many shapes raise at most one alarm per 10,000 logged steps."""

from __future__ import annotations

import pytest

from tests.unit.orchestrator.synthetic_runs import SHAPES, alarms, healthy, watched
from ultrathink.orchestrator.events import Event

STEPS = 2500


@pytest.mark.parametrize("name", SHAPES)
def test_a_healthy_run_raises_no_alarm(name: str) -> None:
    every = (1, 5, 10, 20)[list(SHAPES).index(name) % 4]
    reported = alarms(healthy(name, STEPS, every=every))
    assert not reported, [f"{event.step}: {event.kind}: {event.message}" for event in reported]


@pytest.mark.parametrize("name", SHAPES)
def test_a_short_log_raises_none(name: str) -> None:
    reported: list[Event] = []
    for seed in range(3):
        reported += alarms(healthy(name, 40, every=20, seed=seed))
    assert not reported, [f"{event.step}: {event.kind}: {event.message}" for event in reported]


def test_hard_batches_are_reported_as_such() -> None:
    events = watched(healthy("hard batches", STEPS)).events
    assert {event.kind for event in events} == {"hard_batch"}
    assert len(events) >= 8
