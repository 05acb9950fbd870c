"""The phases of a run."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import law, signals, steady, watched
from ultrathink.orchestrator.phases import CONVERGING, DIVERGING, INITIALIZATION, PLATEAU, VOLATILE
from ultrathink.orchestrator.signals import Signals


@pytest.mark.parametrize("times", [1.0, 1.5])
def test_a_healthy_run_starts_and_converges_also_beyond_a_hard_batch(times: float) -> None:
    loss = steady(3000)
    loss[500] *= times
    phases = watched(signals({"loss": loss})).phases
    assert [phase.phase for phase in phases] == [INITIALIZATION, CONVERGING]


def test_a_loss_that_no_longer_falls_is_on_a_plateau() -> None:
    loss = 2 + 3 * np.exp(-np.arange(3000) / 60)
    loss *= np.exp(0.01 * np.random.default_rng(0).standard_normal(3000))
    phases = watched(signals({"loss": loss})).phases
    assert [phase.phase for phase in phases] == [INITIALIZATION, CONVERGING, PLATEAU]
    assert phases[-1].from_step < 1200


def test_a_spike_makes_a_run_volatile_for_a_while() -> None:
    loss = steady(1000)
    loss[500:506] *= 1.5
    phases = watched(signals({"loss": loss})).phases
    assert [phase.phase for phase in phases] == [INITIALIZATION, CONVERGING, VOLATILE, CONVERGING]
    assert 501 <= phases[2].from_step <= 503
    assert phases[2].to_step <= 506 + 40


def test_a_loss_that_rises_diverges() -> None:
    loss = steady(1000)
    loss[500:] *= np.exp(0.002 * np.arange(500))
    phases = watched(signals({"loss": loss})).phases
    assert phases[-1].phase == DIVERGING
    assert phases[-1].from_step < 650


def test_phases_cover_all_steps_without_a_gap() -> None:
    loss = steady(1000)
    loss[300:305] *= 2
    loss[700:] *= np.exp(0.003 * np.arange(300))
    phases = watched(signals({"loss": loss})).phases
    assert (phases[0].from_step, phases[-1].to_step) == (1, 1000)
    assert all(one.to_step + 1 == after.from_step for one, after in pairwise(phases))
    assert all(one.phase != after.phase for one, after in pairwise(phases))


def test_losses_below_zero_have_phases_too() -> None:
    rng = np.random.default_rng(0)
    loss = 0.5 - 1.0 * (1 - np.exp(-np.arange(2000) / 200)) + 0.03 * rng.standard_normal(2000)
    watcher = watched(signals({"loss": loss}))
    assert [phase.phase for phase in watcher.phases][-1] == PLATEAU
    assert CONVERGING in [phase.phase for phase in watcher.phases]
    assert watcher.forecast() is None


def test_steps_that_were_undone_have_no_phase() -> None:
    watcher = watched(signals({"loss": law(500)}))
    watcher.rewind(250)
    assert watcher.phases[-1].to_step == 250


def test_a_step_that_comes_in_two_parts_has_one_phase() -> None:
    parts = [Signals(1, {"loss": 2.0}), Signals(1, {"loss": 2.0, "grad_norm": math.nan})]
    (phase,) = watched([*parts, Signals(2, {"loss": 2.0})]).phases
    assert (phase.phase, phase.from_step, phase.to_step) == (VOLATILE, 1, 2)
