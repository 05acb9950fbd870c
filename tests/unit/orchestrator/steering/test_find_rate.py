"""Which rate a run ends up with whose rate was too high from the beginning."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from tests.unit.orchestrator.steering.test_policy import situation
from ultrathink.config.orchestrator import LimitsConfig, RulesConfig
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.steering.policy import Policy
from ultrathink.orchestrator.steering.proposals import Proposal
from ultrathink.orchestrator.steering.snapshots import SnapshotRing
from ultrathink.training.changes import Rollback, ScaleLearningRate
from ultrathink.training.settings import LiveSettings
from ultrathink.training.snapshots import Snapshot

TUNED = 0.01


class Run:
    """A run that is nothing but a step and a rate: its loss is the higher, the farther the rate is
    from the tuned one, and updates are as large as four times the rate."""

    def __init__(self, rate: float, *, steps: int = 1000, most: int = 8, **limits: Any) -> None:
        keys = count()
        self.rate, self.total = rate, steps
        self.settings = LiveSettings()
        self.states: dict[int, float] = {}  # scales, by the key of the snapshot
        self.ring = SnapshotRing(lambda: self._snapshot(next(keys)), every=20, most=most)
        self.limits = LimitsConfig(**limits)
        self.policy = Policy(RulesConfig(), self.limits)
        self.step = self.num_taken = 0
        self.decided: list[Proposal] = []
        self.outcomes: list[tuple[bool, str]] = []
        self.noise = (0.02 * np.random.default_rng(0).standard_normal(steps + 1)).tolist()
        self.loss: Callable[[float, int], float] = self._loss
        self.warmup = 10
        self.update_share = 4.0
        self.events: dict[int, list[Event]] = {}

    def _snapshot(self, key: int) -> Snapshot:
        self.states[key] = self.settings.lr_scale
        return Snapshot(self.step, key)

    def _loss(self, rate: float, step: int) -> float:
        off = math.log(rate / TUNED)
        return 2 + 6 / (1 + step / 20) + 0.05 * off**2 + self.noise[step]

    def take(self, until: int, most: int = 1_000_000) -> None:
        while self.step < until and self.num_taken < most:
            self.step += 1
            self.num_taken += 1
            assert self.num_taken < 10 * self.total, "it never ends"
            rate = self.rate * self.settings.lr_scale * min(1.0, self.step / self.warmup)
            values = {
                "loss": self.loss(self.rate * self.settings.lr_scale, self.step),
                "lr_scheduled": rate,
                "lr": rate,
            }
            if self.step % 5 == 0:
                values["update_ratio"] = self.update_share * rate
            self._at_boundary(values)

    def _at_boundary(self, values: dict[str, float]) -> None:
        now = replace(
            situation(),
            step=self.step,
            values=values,
            events=self.events.get(self.step, []),
            snapshots=self.ring,
            settings=self.settings,
            limits=self.limits,
            rollbacks_left=self.limits.rollbacks - self.policy.num_rollbacks,
            samples=8 * self.step,
            total_steps=self.total,
        )
        proposal = self.policy.decide(now)
        self.outcomes += self.policy.take_outcomes().values()
        if proposal is None:
            if self.ring.is_due(self.step):
                self.ring.take(8 * self.step)
            return
        self.decided.append(proposal)
        for change in proposal.changes:
            if isinstance(change, Rollback):
                assert not change.skip_data
                self.ring.go_back_to(change.snapshot)
                self.step = change.snapshot.step
                self.settings.lr_scale = self.states[change.snapshot.key]
            if isinstance(change, ScaleLearningRate):
                self.settings.lr_scale = change.scale


def target_of(proposal: Proposal) -> int:
    [change] = [one for one in proposal.changes if isinstance(one, Rollback)]
    return change.snapshot.step


@pytest.mark.parametrize("times", [5.0, 10.0, 30.0, 80.0])
def test_the_run_continues_with_the_rate_nearest_to_the_tuned_one(times: float) -> None:
    run = Run(times * TUNED)
    run.take(1000)
    assert 1 / math.sqrt(3) < run.rate * run.settings.lr_scale / TUNED < math.sqrt(3)
    assert run.decided[0].reasoning.startswith("Updates are up to ")
    assert "on the same batches" in run.decided[-1].reasoning
    better = [is_better for is_better, _ in run.outcomes]
    assert better == [True] * (len(better) - 1) + [False]
    assert run.ring.held == {}
    assert run.num_taken < 1000 + 100 * (len(run.decided) + 1)


def test_what_is_large_for_other_models_costs_one_trial_and_changes_nothing() -> None:
    run = Run(TUNED)
    run.update_share = 20.0
    run.take(1000)
    assert [target_of(one) for one in run.decided] == [1, 100]
    assert run.settings.lr_scale == 1.0
    assert [is_better for is_better, _ in run.outcomes] == [False]


def test_without_a_reason_nothing_is_tried() -> None:
    run = Run(TUNED)
    run.take(1000)
    assert run.decided == []
    assert run.ring.held == {}


def test_large_updates_later_on_are_no_reason() -> None:
    run = Run(TUNED)
    run.take(100)
    run.update_share = 50.0
    run.take(1000)
    assert run.decided == []


def test_a_grave_alarm_of_the_loss_is_a_reason() -> None:
    run = Run(10 * TUNED)
    run.update_share = 0.0
    reported = Event(50, "gradient_explosion", "high", "the norm is 300", 50, 50)
    run.events = {50: [reported]}
    run.policy.rules = [
        one for one in run.policy.rules if one.name == "find_rate"
    ]  # alone: going back would be the first thing to do
    run.take(1000)
    assert run.decided[0].reasoning.startswith("The norm is 300.")
    assert run.settings.lr_scale == pytest.approx(1 / 9)


def test_a_long_warm_up_is_waited_for() -> None:
    run = Run(10 * TUNED)
    run.warmup = 80
    run.take(1000)
    assert target_of(run.decided[0]) == 1
    assert run.decided[0].began == 160
    assert run.settings.lr_scale == pytest.approx(1 / 9)


def test_a_trial_that_is_no_better_and_no_worse_is_followed_by_a_lower_one() -> None:
    run = Run(10 * TUNED)
    run.loss = lambda rate, step: 3.0 if rate > 2 * TUNED else 2.5 + run.noise[step]
    run.take(1000)
    assert run.settings.lr_scale == pytest.approx(1 / 9)


def test_losses_that_are_no_numbers_are_the_worst() -> None:
    run = Run(10 * TUNED)
    run.loss = lambda rate, step: (
        math.nan if rate > 2 * TUNED and step > 60 else run._loss(rate, step)
    )
    run.policy.rules = [one for one in run.policy.rules if one.name == "find_rate"]
    run.take(1000)
    assert run.settings.lr_scale == pytest.approx(1 / 9)


@pytest.mark.parametrize(
    "limits",
    [
        {"steps": 300},  # too short a run
        {"most": 2},  # no room for what a trial needs
        {"rollbacks": 1},
        {"lr_factor": (1.0, 1.0)},
    ],
)
def test_where_no_trial_is_possible_none_is_begun(limits: dict[str, Any]) -> None:
    run = Run(10 * TUNED, **limits)
    run.take(run.total)
    assert run.decided == []
    assert run.ring.held == {}


def test_rates_stay_within_the_limit_and_going_back_too() -> None:
    low = Run(100 * TUNED, lr_factor=(0.1, 1.0))
    low.take(1000)
    assert low.settings.lr_scale == pytest.approx(1 / 9)
    few = Run(30 * TUNED, rollbacks=3)
    few.take(1000)
    assert few.policy.num_rollbacks <= 3
    assert few.settings.lr_scale in (pytest.approx(1 / 9), pytest.approx(1 / 27))


def test_a_resumed_trial_continues_and_without_its_snapshots_it_ends() -> None:
    whole, run = Run(10 * TUNED), Run(10 * TUNED)
    whole.take(1000)
    run.take(1000, most=150)
    state = json.loads(json.dumps(run.policy.state_dict(), allow_nan=False))
    run.policy = Policy(RulesConfig(), run.limits)
    run.policy.load_state_dict(state)
    run.take(1000, most=250)
    assert run.decided == whole.decided[:2]
    run.ring.held.clear()
    run.take(1000)
    assert len(run.decided) == 2
    assert [is_better for is_better, _ in run.outcomes] == [True, False]
    assert "snapshots are gone" in run.outcomes[-1][1]
