"""The watcher: any input, restarts at any step, steps that go backwards."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.orchestrator.synthetic_runs import (
    SHAPES,
    found,
    healthy,
    law,
    signals,
    steady,
    watched,
)
from ultrathink.orchestrator.detectors import DETECTORS
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.watcher import Watcher

NAMES = (
    "loss",
    "val_loss",
    "loss/web",
    "val_loss/code",
    "accuracy",
    "val_accuracy",
    "grad_norm",
    "lr",
    "step_time",
    "data_wait",
    "tokens_per_sec",
    "memory",
    "memory_reserved",
    "memory_peak",
    "memory_limit",
    "skipped_steps",
    "loss_scale",
    "experts/skill/gini",
    "experts/skill/dead",
    "experts/skill/even_load",
)


def troubled(seed: int, count: int = 400) -> list[Signals]:
    """A run in which nearly all that is watched goes wrong somewhere, validations apart."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "loss": steady(count, seed=seed),
        "grad_norm": np.exp(0.2 * rng.standard_normal(count)),
        "step_time": 1 + 0.1 * rng.random(count),
        "memory": 10 + 0.02 * np.arange(count),
        "memory_limit": np.full(count, 20.0),
        "loss_scale": 2.0 ** rng.integers(0, 17, count),
        "skipped_steps": np.cumsum(rng.random(count) < 0.1),
        "accuracy": np.where(np.arange(count) < 200, 0.8, 0.4) + 0.01 * rng.standard_normal(count),
        "loss/web": law(count),
        "loss/code": 1 + 0.004 * np.arange(count),
        "experts/skill/gini": rng.uniform(0.1, 1, count).round(),
        "experts/skill/dead": rng.integers(0, 2, count),
    }
    for name in ("loss", "grad_norm", "step_time"):
        for start in rng.integers(50, count, 4):
            columns[name][start : start + rng.integers(1, 12)] *= rng.uniform(1.2, 20)
    columns["loss"][rng.integers(0, count, 3)] = math.nan
    run = []
    for one in signals(columns):
        run.append(one)
        if one.step % 20 == 0:
            run.append(Signals(one.step, {"val_loss": 3 + abs(one.step - 150) / 100}))
    return run


@settings(max_examples=12)
@given(st.integers(0, 1000), st.integers(1, 419))
@example(0, 415)  # within the last point of the curve
def test_a_restart_at_any_step_changes_nothing(seed: int, stop: int) -> None:
    run = troubled(seed)
    watcher, other = Watcher(total_steps=500), Watcher()
    for one in run[:stop]:
        watcher.observe(one)
    state = json.loads(json.dumps(watcher.state_dict(), allow_nan=False))
    other.load_state_dict(state)
    assert other.state_dict() == state
    for one in run[stop:]:
        assert other.observe(one) == watcher.observe(one)
    assert other.finish() == watcher.finish()
    assert other.report() == watcher.report()
    assert other.state_dict() == watcher.state_dict()
    assert len(watcher.events) >= 5


ANY = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, 2.5, 1e-320, 1e308, -1e308, math.nan, math.inf]),
    st.floats(0, 10),
)


def test_negative_losses_are_judged_as_finely_after_a_restart() -> None:
    loss = -5 + 1e-5 * np.random.default_rng(0).standard_normal(200)
    loss[150:153] += 1e-3
    run = list(signals({"loss": loss}))
    whole, other = watched(run), Watcher()
    other.load_state_dict(watched(run[:100], end=False).state_dict())
    for one in run[100:]:
        other.observe(one)
    other.finish()
    assert [event.kind for event in whole.events] == ["loss_spike"]
    assert other.events == whole.events


@settings(max_examples=60)
@given(st.data())
def test_no_input_is_too_odd(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    watcher = Watcher()
    rows = data.draw(
        st.lists(st.tuples(st.integers(-3, 40), *[ANY for _ in names]), min_size=1, max_size=30)
    )
    for step, *values in rows * data.draw(st.sampled_from([1, 6])):
        reported = watcher.observe(Signals(step, dict(zip(names, values, strict=True))))
        assert all(event in watcher.events for event in reported)
    watcher.finish()
    json.dumps([watcher.report(), watcher.state_dict()], allow_nan=False)


@settings(max_examples=12)
@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), max_size=4),
)
def test_steps_may_go_backwards(seed: int, resumes: list[tuple[int, int]]) -> None:
    run, watcher = troubled(seed, 300), Watcher()
    begin = 0
    for stop, back in [*resumes, (len(run), 0)]:
        for one in run[begin:stop]:
            watcher.observe(one)
        begin = max(0, stop - back)
    watcher.finish()
    phases = watcher.phases
    assert all(one.from_step <= one.to_step for one in phases)
    assert all(one.to_step < after.from_step for one, after in pairwise(phases))
    for event in watcher.events:
        assert event.step <= event.to_step
    json.dumps([watcher.report(), watcher.state_dict()], allow_nan=False)


def test_a_resume_is_reported_and_spikes_after_it_are_events_of_their_own() -> None:
    loss = steady(400)
    loss[300:304] *= 1.5
    run = list(signals({"loss": loss}))
    watcher = watched([*run[:304], *run[280:]])
    assert [(event.kind, event.step) for event in watcher.events] == [
        ("resumed", 281),
        ("loss_spike", 301),
        ("loss_spike", 301),
    ]


def test_a_rollback_forgets_what_was_pending() -> None:
    loss = steady(400)
    watcher = Watcher()
    for one in signals({"loss": [*loss[:300], loss[300] * 2]}):
        watcher.observe(one)
    watcher.rewind(300)
    for one in signals({"loss": loss[300:]}, start=301):
        watcher.observe(one)
    watcher.finish()
    assert [event.kind for event in watcher.events] == ["resumed"]


@pytest.mark.parametrize("back", [40, 150, 299])
def test_a_resume_on_a_steep_curve_is_no_rise(back: int) -> None:
    """What lies beyond is forgotten: the losses of then were higher."""
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(600))
    loss = 8 * np.exp(-0.008 * np.arange(600)) * noise
    watcher = watched(signals({"loss": loss[:300]}), end=False)
    for one in signals({"loss": loss[300 - back :]}, start=301 - back):
        watcher.observe(one)
    watcher.finish()
    assert [event.kind for event in watcher.events if event.kind != "hard_batch"] == ["resumed"]


def test_events_are_reported_when_new_or_graver() -> None:
    loss = steady(400)
    loss[300:306] *= np.array([1.15, 1.15, 1.9, 1.9, 1.9, 1.9])
    watcher, reported = Watcher(), []
    for one in signals({"loss": loss}):
        reported += [(one.step, event.severity) for event in watcher.observe(one)]
    assert reported == [(302, "medium"), (303, "high")]


def test_a_detector_without_a_state_starts_afresh_and_a_state_without_one_is_kept() -> None:
    """Objectives differ in the detectors that apply."""
    watcher = watched(troubled(0), end=False)
    other = Watcher(detectors=[make() for make in DETECTORS if make.__name__ != "LossSpike"])
    state: Any = json.loads(json.dumps(watcher.state_dict()))
    del state["detectors"]["Memory"]
    other.load_state_dict(state)
    fresh: Any = Watcher().state_dict()["detectors"]
    assert other.state_dict()["detectors"] == {
        **state["detectors"],
        "Memory": fresh["Memory"],
    }


def test_the_forecast_is_for_the_end_of_the_budget() -> None:
    run = list(signals({"loss": steady(1000)}))
    watcher = Watcher(total_steps=3000)
    assert watcher.forecast() is None
    for one in run:
        watcher.observe(one)
    ahead = watcher.forecast()
    assert ahead is not None
    assert ahead.step == 3000
    assert ahead.low < law(3000)[-1] < ahead.high
    assert watcher.report()["forecast"]["loss"] == ahead.loss
    watcher.total_steps = None
    ahead = watcher.forecast()
    assert ahead is not None
    assert ahead.step == 2000


def test_spikes_are_found_in_every_healthy_shape_with_a_steady_loss() -> None:
    for name in ("noise of 0.2%", "noise of 5.0%", "heavy tailed", "correlated", "cosine end"):
        assert name in SHAPES
        loss = np.array([one.values["loss"] for one in healthy(name, 600)])
        loss[500:505] *= 1.8
        assert [event.step for event in found({"loss": loss}, "loss_spike")] == [501], name
