"""Experts that stay without tokens: going back first, then re-initialized."""

from typing import Any

import numpy as np
import pytest

from tests.unit.orchestrator.steering.test_policy import policy_for, ring, situation
from tests.unit.orchestrator.steering.test_steering import ACT, decisions
from tests.unit.training.conftest import MakeTrainer, make_trainer
from tests.unit.training.observers import At, Recorder
from ultrathink.config.orchestrator import LimitsConfig, RulesConfig
from ultrathink.monitoring.experts import ExpertStatistics, GroupSlots
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.steering.policy import Policy
from ultrathink.orchestrator.steering.proposals import HARD, MEDIUM
from ultrathink.runs.decisions import Decision
from ultrathink.training.changes import ReviveExperts

__all__ = ["make_trainer"]

FOUND = Event(
    95, "dead_expert", "medium", "group b has 2 dead experts", 300, 300, "b", {"dead": 2.0}
)
DEAD = [{"layer": 1, "group": "b", "expert": 1}, {"layer": 4, "group": "b", "expert": 0}]


def statistics() -> ExpertStatistics:
    """Two layers; group ``b`` has three experts and an empty slot, two of them without a token."""
    load = np.array([[9.0, 0, 5, 0, 3, 0], [9.0, 2, 0, 5, 3, 0]])
    return ExpertStatistics(
        groups=(GroupSlots("a", 1, 0, 2), GroupSlots("b", 1, 2, 6)),
        layers=(1, 4),
        num_tokens=100,
        warmup=1.0,
        active=np.array([[True] * 5 + [False]] * 2),
        load=load,
        dropped=0 * load,
        probability=load,
        entropy=np.ones((2, 2)),
        confidence=np.ones((2, 2)),
    )


def asked(**given: Any) -> Any:
    plain = {"step": 300, "events": [FOUND], "experts": statistics(), "snapshots": ring(200)}
    return Policy(RulesConfig(), LimitsConfig()).decide(situation(**{**plain, **given}))


def went_back(to: int, dead: float = 2.0) -> Decision:
    signals = {"dead": dead}
    return Decision(1, 200, "roll_back", HARD, 0.9, signals, "rollback", 200, to, "Why.")


def test_without_a_snapshot_of_before_all_dead_ones_are_re_initialized_at_once() -> None:
    proposal = asked()
    assert (proposal.rule, proposal.level) == ("revive_experts", MEDIUM)
    assert proposal.changes == (ReviveExperts(DEAD),)


def test_the_run_goes_back_first_where_it_can() -> None:
    assert asked(snapshots=ring(40, 200)).rule == "roll_back"


@pytest.mark.parametrize(
    ("decision", "rule"),
    [
        (went_back(40), "revive_experts"),
        (went_back(40, dead=0.0), "roll_back"),  # for something else
        (went_back(-400), "roll_back"),  # long ago
    ],
)
def test_going_back_for_them_is_tried_once(decision: Decision, rule: str) -> None:
    found = asked(snapshots=ring(40, 200), decisions=[decision], since_rollback=260)
    assert found.rule == rule


def test_other_events_and_steps_that_tell_nothing_of_experts_are_left_alone() -> None:
    rule = policy_for("revive_experts")
    uneven = Event(95, "expert_imbalance", "medium", "uneven", 300, 300, "b", {"dead": 2.0})
    assert rule.decide(situation(events=[uneven], experts=statistics())) is None
    assert rule.decide(situation(events=[FOUND])) is None


SMALL = (
    "model.num_layers=1",
    "model.hidden_size=16",
    "data.seq_len=16",
    "model.moe={groups: [{name: a, num_experts: 4, top_k: 2}], intermediate_size: 16, "
    "routing: {warmup_steps: 0}, balance: {bias_rate: 0.02}}",
    "training.max_steps=300",
    "training.schedule={type: wsd, warmup: 10, decay: 0}",
)


def test_a_run_gets_its_dead_expert_back(make_trainer: MakeTrainer) -> None:
    loads = []

    def kill(_: Any) -> None:
        trainer.model.expert_layers()[0].router.selection_bias[2] = -1e4

    for rules in ("{roll_back: false}", "{roll_back: false, revive_experts: false}"):
        recorder = Recorder()
        trainer = make_trainer(
            *SMALL,
            ACT,
            f"orchestrator.rules={rules}",
            callbacks=[recorder],
            controllers=[At(step205=kill)],
        )
        trainer.fit()
        figures = [report.experts for report in recorder.steps[-20:]]
        loads.append([int(one.load[0, 2]) for one in figures if one is not None])
        decided = decisions(trainer, "revive_experts")
        assert len(decided) == ("revive_experts" not in rules)
    assert decided == []
    assert min(loads[0]) > 0
    assert max(loads[1]) == 0
