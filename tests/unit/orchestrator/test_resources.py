"""Memory, speed and the loader."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import Floats, found, signals, watched


def times(count: int = 400, seed: int = 0) -> Floats:
    return 1 + 0.05 * np.abs(np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize(("share", "severity"), [(0.94, "medium"), (0.98, "high")])
def test_memory_near_its_limit_is_pressure(share: float, severity: str) -> None:
    used = np.where(np.arange(100) < 50, 40.0, share * 80)
    (event,) = found({"memory": used, "memory_limit": np.full(100, 80.0)}, "memory_pressure")
    assert (event.step, event.severity) == (51, severity)
    assert event.values == {"memory": pytest.approx(share * 80), "limit": 80.0}


def test_the_peak_counts_and_what_is_only_reserved_does_not() -> None:
    limit, used = np.full(100, 80.0), np.full(100, 60.0)
    columns = {"memory": used, "memory_limit": limit, "memory_peak": np.full(100, 79.0)}
    assert found(columns, "memory_pressure")
    columns = {"memory": used, "memory_limit": limit, "memory_reserved": np.full(100, 79.0)}
    assert watched(signals(columns)).events == []


def test_memory_that_keeps_growing_is_one_leak() -> None:
    rng = np.random.default_rng(0)
    used = 10 + 0.02 * np.arange(400) + 0.05 * rng.standard_normal(400)
    (event,) = found({"memory": used}, "memory_leak")
    assert event.severity == "medium"
    assert event.found_at <= 128
    assert event.to_step > 380
    assert event.values["per_step"] == pytest.approx(0.02, rel=0.1)


def test_a_leak_that_will_soon_fill_the_memory_is_grave() -> None:
    columns = {"memory": 10 + 0.02 * np.arange(200), "memory_limit": np.full(200, 24.0)}
    assert found(columns, "memory_leak")[0].severity == "high"


@pytest.mark.parametrize(
    "used",
    [
        10 + 15 * (1 - np.exp(-np.arange(400) / 60)),  # caches fill up
        10 + 5 * (np.arange(400) > 200),  # a longer batch
        10 + 0.001 * np.arange(400),  # next to nothing
        10 + 3 * np.random.default_rng(0).random(400),
        10 + 2 * (np.arange(400) // 100),
    ],
    ids=["filling", "step", "little", "jitter", "stairs"],
)
def test_memory_that_grows_otherwise_is_no_leak(used: Floats) -> None:
    assert watched(signals({"memory": used})).events == []


def test_memory_reserved_and_not_used_is_fragmentation_where_memory_is_scarce() -> None:
    columns = {"memory": np.full(50, 30.0), "memory_reserved": np.full(50, 75.0)}
    assert found(columns, "memory_fragmentation") == []
    columns["memory_limit"] = np.full(50, 80.0)
    (event,) = found(columns, "memory_fragmentation")
    assert (event.found_at, event.severity) == (8, "medium")
    columns["memory_limit"] = np.full(50, 160.0)
    assert found(columns, "memory_fragmentation") == []


@pytest.mark.parametrize("name", ["step_time", "tokens_per_sec"])
def test_a_speed_that_falls_is_a_drop_until_it_is_usual(name: str) -> None:
    values = times()
    values[200:] *= 2
    (event,) = found({name: values if name == "step_time" else 5000 / values}, "throughput_drop")
    assert event.severity == "medium"
    assert 205 < event.found_at <= 201 + 16
    assert event.to_step < 320
    assert event.values["ratio"] == pytest.approx(0.5, rel=0.1)


def test_larger_batches_take_longer_and_are_no_drop() -> None:
    values = times()
    values[200:] *= 2
    speed = np.where(np.arange(400) < 200, 5000, 10_000) / values
    assert watched(signals({"step_time": values, "tokens_per_sec": speed})).events == []


def test_slow_first_steps_pauses_and_jitter_are_no_drop() -> None:
    rng = np.random.default_rng(0)
    values = times(5000)
    values[:3] = (90.0, 8.0, 2.0)
    values[rng.random(5000) < 0.3] *= 1.9  # a neighbour on the machine
    values[500::500] = 40.0
    events = watched(signals({"step_time": values})).events
    assert {event.kind for event in events} == {"slow_step"}
    assert {event.severity for event in events} == {"info"}
    assert [event.step for event in events] == list(range(501, 5001, 500))


def test_a_loader_that_keeps_steps_waiting_starves_them() -> None:
    seconds = times()
    wait = np.where(np.arange(400) < 200, 0.02, 0.45) * seconds
    (event,) = found({"step_time": seconds, "data_wait": wait}, "starving_loader")
    assert (event.found_at, event.to_step, event.severity) == (208, 400, "medium")
    wait = np.where(np.arange(400) % 8 == 0, 0.8, 0.02) * seconds
    assert found({"step_time": seconds, "data_wait": wait}, "starving_loader") == []
