"""How sure a proposal is, and which of several is carried out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ultrathink.config.orchestrator import LimitsConfig, RulesConfig
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.steering.outliers import Judgement, OutlierFilter
from ultrathink.orchestrator.steering.policy import Policy
from ultrathink.orchestrator.steering.proposals import (
    CRITICAL,
    HARD,
    SOFT,
    Proposal,
    confidence_after,
    confidence_of,
    line_of,
)
from ultrathink.orchestrator.steering.rules import Rule, Situation
from ultrathink.orchestrator.steering.snapshots import SnapshotRing
from ultrathink.runs.decisions import Decision
from ultrathink.training.change import Change
from ultrathink.training.changes import (
    ClearMemory,
    CorrectLearningRate,
    Rollback,
    SetLearningRateFactor,
    Stop,
)
from ultrathink.training.settings import LiveSettings
from ultrathink.training.snapshots import Snapshot


def situation(**values: Any) -> Situation:
    plain: dict[str, Any] = {
        "step": 100,
        "values": {},
        "events": [],
        "outliers": OutlierFilter(),
        "non_finite": 0,
        "snapshots": SnapshotRing(lambda: Snapshot(50, 0), every=50, most=4),
        "decisions": [],
        "settings": LiveSettings(),
        "limits": LimitsConfig(),
        "since_rollback": None,
        "rollbacks_left": 12,
        "samples": 0,
        "total_steps": 1000,
    }
    return Situation(**{**plain, **values})


def proposing(name: str, level: int, confidence: float, *changes: Change, cool: int = 8) -> Rule:
    class Given(Rule):
        cool_down = cool

        def propose(self, now: Situation) -> Proposal:
            return Proposal(name, level, confidence, changes or (ClearMemory(),), "test")

    Given.name = name
    return Given()


def policy(*rules: Rule, **limits: Any) -> Policy:
    made = Policy(RulesConfig(), LimitsConfig(**limits))
    made.rules = list(rules)
    return made


@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential", "standard_cauchy"])
def test_no_distribution_has_more_beyond_a_score_than_the_confidence_leaves(draw: str) -> None:
    values = getattr(np.random.default_rng(0), draw)(100_000)
    for score in (0.5, 1.0, 2.0, 5.0):
        beyond = float(np.mean(values > values.mean() + score * values.std()))
        assert beyond <= 1 - confidence_of(score) + 1e-12
    assert confidence_of(-3.0) == 0.0


def test_what_was_seen_in_a_row_is_ever_surer() -> None:
    """A coin of unknown fairness that came up heads n times does so again with (n+1)/(n+2)."""
    draw = np.random.default_rng(1)
    fairness = draw.random(400_000)
    for count in (1, 3, 8):
        heads = (draw.random((count, fairness.size)) < fairness).all(0)
        again = draw.random(int(heads.sum())) < fairness[heads]
        assert confidence_after(count) == pytest.approx(float(again.mean()), abs=0.01)


def test_the_gravest_is_taken_then_the_surest() -> None:
    rules = [proposing("a", SOFT, 1.0), proposing("b", HARD, 0.95), proposing("c", HARD, 0.99)]
    taken = policy(*rules).decide(situation())
    assert taken is not None
    assert taken.rule == "c"


@pytest.mark.parametrize(
    ("level", "confidence", "is_taken"),
    [(SOFT, 0.69, False), (SOFT, 0.7, True), (HARD, 0.89, False), (CRITICAL, 0.0, True)],
)
def test_how_sure_is_sure_enough(level: int, confidence: float, is_taken: bool) -> None:
    taken = policy(proposing("a", level, confidence)).decide(situation())
    assert (taken is not None) is is_taken


def test_a_rule_rests_after_a_decision_while_others_may_act() -> None:
    made = policy(proposing("a", HARD, 1.0, cool=3), proposing("b", SOFT, 1.0, cool=0))
    taken = [made.decide(situation()) for _ in range(6)]
    assert [one.rule for one in taken if one is not None] == ["a", "b", "b", "b", "a", "b"]


def test_going_back_is_limited_and_remembered() -> None:
    rule = proposing("a", HARD, 1.0, Rollback(Snapshot(50, 0)), cool=0)
    made = policy(rule, rollbacks=2)
    assert [made.decide(situation()) is not None for _ in range(4)] == [True, True, False, False]
    again = policy(rule, rollbacks=2)
    again.load_state_dict(made.state_dict())
    assert again.decide(situation()) is None
    assert again.num_rollbacks == 2


def test_ending_the_run_must_be_allowed() -> None:
    assert policy(proposing("a", HARD, 1.0, Stop()), may_stop=False).decide(situation()) is None


def test_rules_that_are_switched_off_are_not_asked() -> None:
    names = [rule.name for rule in Policy(RulesConfig(roll_back=False), LimitsConfig()).rules]
    assert names == [
        "safety_net",  # which takes back what the others did
        "correct_rate",
        "stop_overfitting",
        "find_rate",
        "revive_experts",
        "save_memory",
    ]


def test_a_correction_stays_within_its_limit() -> None:
    values = {"lr": 1.0, "lr_scheduled": 1e-6}
    proposal = policy_for("correct_rate").decide(
        situation(values=values, limits=LimitsConfig(lr_correction=50.0))
    )
    assert proposal is not None
    assert proposal.changes == (CorrectLearningRate(1 / 50),)


def policy_for(name: str) -> Policy:
    rules = {rule: rule == name for rule in RulesConfig.model_fields}
    return Policy(RulesConfig(**rules), LimitsConfig())


def test_a_decision_says_what_was_done_in_a_line() -> None:
    decision = Decision(
        3, 630, "roll_back", HARD, 0.97, {"loss": 7.1}, "rollback", 630, 600, "Why."
    )
    decision.also.append({"action": "lr_factor", "before": 1.0, "after": 0.5})
    assert line_of(decision) == (
        "step 630, roll_back (hard, 97%): went back to step 600, lr_factor: 1 -> 0.5. Why."
    )
    assert Decision(**decision.to_json()) == decision


def target_of(proposal: Proposal) -> int:
    [change] = [one for one in proposal.changes if isinstance(one, Rollback)]
    return change.snapshot.step


def rolled_back_to(step: int) -> Decision:
    return Decision(1, 100, "roll_back", HARD, 0.97, {}, "rollback", 100, step, "Why.")


def ring(*steps: int) -> SnapshotRing:
    taken = iter(steps)
    made = SnapshotRing(lambda: Snapshot(next(taken), 0), every=1, most=8)
    for _ in steps:
        made.take(0)
    return made


def test_steps_without_numbers_take_the_run_back_before_they_began() -> None:
    rule = policy_for("roll_back")
    proposal = rule.decide(situation(step=100, non_finite=3, snapshots=ring(20, 40, 97)))
    assert proposal is not None
    assert proposal.changes == (Rollback(Snapshot(40, 0)),)  # 97 may hold the cause
    assert proposal.level == CRITICAL


@pytest.mark.parametrize(("count", "target"), [(3, None), (24, 20)])
def test_a_snapshot_that_is_bad_itself_is_passed_over_once_that_is_clear(
    count: int, target: int | None
) -> None:
    """Nothing was learned since the run went back to 40, and no step is a number."""
    proposal = policy_for("roll_back").decide(
        situation(
            step=40 + count,
            non_finite=count,
            snapshots=ring(20, 40),
            decisions=[rolled_back_to(40)],
            since_rollback=0,
        )
    )
    found = None if proposal is None else target_of(proposal)
    assert found == target


def test_losses_too_good_to_be_true_take_the_run_back_once() -> None:
    """After that they may be how the data is, and the filter gets used to them."""
    outliers = OutlierFilter()
    outliers.streak = 8
    outliers.last = Judgement(0.5, 2.0, -12.0, 1.0, 1.0, 0.0)
    given = {"outliers": outliers, "snapshots": ring(50)}
    first = policy_for("roll_back").decide(situation(**given))
    assert first is not None
    assert [type(one) for one in first.changes] == [Rollback]
    again = situation(**given, decisions=[rolled_back_to(50)], since_rollback=10)
    assert policy_for("roll_back").decide(again) is None


def test_trouble_that_comes_back_lowers_the_rate_too() -> None:
    event = Event(95, "divergence", "high", "it rose", 100, 100, values={"score": 9.0})
    given = {"step": 100, "events": [event], "snapshots": ring(20, 40, 90)}
    first = policy_for("roll_back").decide(situation(**given))
    again = policy_for("roll_back").decide(
        situation(**given, decisions=[rolled_back_to(40)], since_rollback=60)
    )
    assert first is not None
    assert again is not None
    assert first.changes == (Rollback(Snapshot(90, 0)),)
    assert again.changes == (
        Rollback(Snapshot(90, 0)),
        SetLearningRateFactor(0.5, 200),
    )


def test_trouble_at_the_same_step_is_the_same_however_far_the_run_went_back() -> None:
    event = Event(395, "divergence", "high", "it rose", 400, 400, values={"score": 9.0})
    given = {"step": 400, "events": [event], "snapshots": ring(20, 390)}
    [rule] = [one for one in policy_for("roll_back").rules if one.name == "roll_back"]
    gone = replace(rolled_back_to(20), before=401)
    again = rule.propose(situation(**given, decisions=[gone], since_rollback=380))
    later = rule.propose(situation(**{**given, "step": 800}, decisions=[gone], since_rollback=780))
    assert again is not None
    assert later is not None
    assert len(again.changes) == 2
    assert len(later.changes) == 1


@pytest.mark.parametrize(
    ("allowed", "factor"), [((0.01, 1.0), 0.1), ((0.3, 1.0), 0.3), ((0.01, 0.05), 0.05)]
)
def test_without_a_snapshot_that_is_old_enough_the_rate_is_lowered(
    allowed: tuple[float, float], factor: float
) -> None:
    event = Event(95, "loss_spike", "high", "it jumped", 100, 100, values={"score": 9.0})
    limits = LimitsConfig(lr_factor=allowed)
    proposal = policy_for("roll_back").decide(
        situation(step=100, events=[event], snapshots=ring(94), limits=limits)
    )
    assert proposal is not None
    assert proposal.changes == (SetLearningRateFactor(factor, 200),)
