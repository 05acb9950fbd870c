"""The orchestrator in real runs: what it does about real faults, and that it does nothing else."""

import json
from typing import Any

import pytest
import torch

from tests.unit.orchestrator.steering.broken_runs import (
    ACT,
    RUN,
    Breaks,
    broken_run,
    decisions,
    scale_a_weight,
    steering_of,
)
from tests.unit.training.all_changes import one_of_each
from tests.unit.training.conftest import MakeTrainer, make_trainer
from tests.unit.training.observers import At, Recorder, asks, final_state
from ultrathink.core.errors import UltrathinkError
from ultrathink.orchestrator.live import LiveWatch
from ultrathink.orchestrator.steering import find_rate
from ultrathink.recipes.parts.steering import orchestrator_of
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.decisions import read_decisions
from ultrathink.training.callbacks import Controller, StepReport
from ultrathink.training.changes import (
    CorrectLearningRate,
    Rollback,
    ScaleLearningRate,
    SetEvaluation,
    SetOptimizerOption,
    SetRouting,
    SetWeightDecay,
    Stop,
)
from ultrathink.training.control import TrainerControl
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.trainer import Trainer

__all__ = ["make_trainer"]


def test_a_healthy_run_is_the_same_to_the_bit(make_trainer: MakeTrainer) -> None:
    """Watching, snapshots, the guard and the policy leave no trace."""
    states = []
    for mode in ("off", "advise", "act"):
        trainer = make_trainer(*RUN, f"orchestrator.mode={mode}", "model.dropout=0.1")
        trainer.fit()
        states.append(final_state(trainer.run))
        assert not trainer.run.decisions.exists()
        assert any(isinstance(part, LiveWatch) for part in trainer.callbacks) == (mode != "off")
    for other in states[1:]:
        assert states[0].keys() == other.keys()
        assert all(torch.equal(states[0][name], other[name]) for name in states[0])
    assert len(steering_of(trainer).snapshots.steps) > 2  # type: ignore[union-attr]


def test_broken_weights_are_taken_back(make_trainer: MakeTrainer) -> None:
    trainer = broken_run(make_trainer, 110, scale_a_weight, ACT)
    [rollback] = decisions(trainer, "roll_back")
    assert rollback["action"] == "rollback"
    assert rollback["before"] == rollback["step"] > 110
    assert rollback["after"] <= 110
    assert rollback["level"] in (3, 4)
    assert rollback["confidence"] >= 0.9
    assert rollback["reasoning"]
    unhelped = broken_run(make_trainer, 110, scale_a_weight, "orchestrator.mode=advise")
    clean = make_trainer(*RUN)
    clean.fit()
    losses = []
    for one in (clean, trainer, unhelped):
        assert one.progress.step == 140
        losses.append(one.score().loss)
    assert losses[1] < losses[0] * 1.02
    assert losses[2] > losses[0] * 1.05
    assert trainer.loader.samples_skipped == 4 * (rollback["before"] - rollback["after"])
    assert_has_one_line_each(trainer)
    assert_resumes_with_all_that_it_knows(make_trainer, trainer)


def assert_has_one_line_each(trainer: Trainer) -> None:
    """Of its decisions, in the end."""
    lines = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(1, len(lines) + 1))
    keys = {"step", "level", "signals", "rule", "confidence", "action", "before", "after"}
    for line in lines:
        assert keys | {"reasoning", "outcome", "time"} <= line.keys()
    status = steering_of(trainer).get_adaptive_status()
    assert status["adaptive_decisions_made"] == len(lines)
    assert status["rollbacks"] == 1
    assert status["forecast_error"] is None  # the first comes due at step 156
    assert len(status["recent_decisions"]) == min(10, len(lines))


def assert_resumes_with_all_that_it_knows(make: MakeTrainer, whole: Trainer) -> None:
    """A run that went back is stopped and resumed, and is the one that was not."""

    class StopsAt(Controller):
        def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
            if report.step == 125 and steering_of(trainer).decisions:
                control.request(Stop(), reason="test")

    breaks = Breaks(110, scale_a_weight)
    trainer = make(*RUN, ACT, callbacks=[breaks], controllers=[StopsAt()])
    breaks.trainer = trainer
    assert trainer.fit().name == "stopped"
    before = steering_of(trainer).state_dict()
    again = resume_trainer(trainer.run, controllers=[StopsAt()])
    assert steering_of(again).state_dict() == before
    again.fit()
    one, other = final_state(whole.run), final_state(again.run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    reported = [
        [{**record, "time": 0} for record in read_decisions(run.decisions) if record["id"]]
        for run in (whole.run, again.run)
    ]
    assert reported[0] == reported[1]


def test_a_layer_that_was_lost_is_taken_back(make_trainer: MakeTrainer) -> None:
    """The loss of so small a model hardly tells of it."""

    def lose(trainer: Trainer) -> None:
        with torch.no_grad():
            for parameter in trainer.model.blocks[1].parameters():
                parameter.zero_()

    trainer = broken_run(make_trainer, 110, lose, ACT)
    [rollback] = decisions(trainer, "roll_back")
    assert rollback["after"] <= 110 < rollback["step"]
    assert all(bool(one.any()) for one in trainer.model.blocks[1].parameters())


def test_one_bad_batch_is_left_out_and_nothing_else(make_trainer: MakeTrainer) -> None:
    def poison(trainer: Trainer) -> None:
        original = trainer.loader.next_batch

        def once() -> Any:
            trainer.loader.next_batch = original  # type: ignore[method-assign]
            batch = original()
            draw = torch.Generator().manual_seed(1)
            batch.input_ids.random_(0, 250, generator=draw)
            batch.labels.random_(0, 250, generator=draw)
            return batch

        trainer.loader.next_batch = once  # type: ignore[method-assign]

    trainer = broken_run(make_trainer, 110, poison, ACT)
    [skipped] = read_decisions(trainer.run.decisions)
    assert (skipped["rule"], skipped["action"], skipped["step"]) == (
        "skip_outliers",
        "skip_batch",
        111,
    )
    assert skipped["outcome"]["resolved"] is True
    assert skipped["outcome"]["skipped"] == 1
    assert trainer.progress.num_skipped == 1


def test_a_rate_that_is_off_is_put_right_and_its_steps_are_undone(
    make_trainer: MakeTrainer,
) -> None:
    def raise_rate(trainer: Trainer) -> None:
        for group in trainer.stepper.optimizers[0].param_groups:
            group["peak_lr"] *= 10

    trainer = broken_run(make_trainer, 110, raise_rate, ACT)
    [correction] = decisions(trainer, "correct_rate")
    assert (correction["step"], correction["action"]) == (111, "rollback")
    assert [one["action"] for one in correction["also"]] == ["lr_correction"]
    assert correction["also"][0]["after"] == pytest.approx(0.1)
    assert trainer.loader.samples_skipped == 0
    clean = make_trainer(*RUN)
    clean.fit()
    assert trainer.score().loss == pytest.approx(clean.score().loss, rel=1e-4)


def repeat_one_batch(trainer: Trainer) -> None:
    batch = trainer.loader.next_batch()
    trainer.loader.next_batch = lambda: batch  # type: ignore[method-assign]


LONGER = ("training.max_steps=400", "training.schedule={type: wsd, warmup: 10, decay: 20%}")


def test_a_rate_that_is_too_high_from_the_start_is_lowered(make_trainer: MakeTrainer) -> None:
    scores = []
    for rate, mode in ((0.003, "off"), (0.3, "off"), (0.3, "act")):
        trainer = make_trainer(
            *RUN,
            *LONGER,
            f"training.optimizer={{type: adamw, lr: {rate}}}",
            f"orchestrator.mode={mode}",
        )
        trainer.fit()
        scores.append(trainer.score().loss)
    tuned, too_high, steered = scores
    assert too_high > 1.1 * tuned
    assert steered - tuned < 0.25 * (too_high - tuned)
    tried = decisions(trainer, "find_rate")
    assert [one["action"] for one in tried] == ["rollback"] * len(tried)
    assert all(one["outcome"] is not None for one in tried)
    assert "on the same batches" in tried[-1]["reasoning"]
    assert trainer.settings.lr_scale == pytest.approx(tried[-1]["signals"]["lr_scale"])


def test_a_rate_that_is_given_again_is_taken_as_it_is(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*RUN, ACT, controllers=[At(step5=scale), At(step10=stop)])
    trainer.fit()
    plain = resume_trainer(trainer.run, overrides=["orchestrator.rules.find_rate=false"])
    assert plain.settings.lr_scale == 0.5
    plain.close()
    given = resume_trainer(trainer.run, overrides=["training.optimizer.lr=0.001"])
    assert given.settings.lr_scale == 1.0
    given.close()


def scale(control: TrainerControl) -> None:
    control.request(ScaleLearningRate(0.5), reason="test")


def stop(control: TrainerControl) -> None:
    control.request(Stop(), reason="test")


def test_a_lower_rate_that_does_not_help_leaves_no_trace(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_rate, "LARGE_UPDATE", 0.0)
    states = []
    for mode in ("off", "act"):
        trainer = make_trainer(
            *RUN, *LONGER, f"orchestrator.mode={mode}", "training.optimizer.lr=0.001"
        )
        trainer.fit()
        states.append(final_state(trainer.run))
    assert [one["after"] for one in decisions(trainer, "find_rate")] == [1, 40]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("may_stop", [True, False])
def test_overfitting_ends_with_the_best_weights(make_trainer: MakeTrainer, may_stop: bool) -> None:
    recorder = Recorder()
    breaks = Breaks(70, repeat_one_batch)
    trainer = make_trainer(
        *RUN,
        ACT,
        f"orchestrator.limits.may_stop={str(may_stop).lower()}",
        "training.optimizer={type: adamw, lr: 0.01}",
        "training.eval={every_steps: 10, max_tokens: 4096}",
        callbacks=[recorder, breaks],
    )
    breaks.trainer = trainer
    ending = trainer.fit()
    found = decisions(trainer, "stop_overfitting")
    best = min(recorder.validations, key=lambda report: report.loss)
    if not may_stop:  # the safety net goes back all the same, once the run is over
        assert (ending.name, found) == (f"returned to step {best.step}", [])
        assert trainer.score().loss == best.loss
        return
    assert ending.name == "stopped"
    [decision] = found
    assert decision["after"] == best.step == trainer.progress.step
    assert [one["action"] for one in decision["also"]] == ["average_snapshots", "stop"]
    scored = trainer.score().loss
    assert scored <= best.loss


def test_its_own_failure_does_not_end_the_run(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(*RUN, ACT, "training.max_steps=30", callbacks=[recorder])
    steering = steering_of(trainer)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("test")

    steering.policy.decide = fail  # type: ignore[method-assign, assignment]
    steering.outliers.skips = fail  # type: ignore[method-assign, assignment]
    assert trainer.fit().name == "finished"
    for who in ("the orchestrator failed at step 1", "the guard failed"):
        [reported] = [text for text in recorder.messages if who in text]
        assert "training continues" in reported
    assert steering.get_adaptive_status()["monitoring_active"] is False


def test_everything_can_be_done_by_hand(make_trainer: MakeTrainer) -> None:
    experts = (
        "model.moe={groups: [{name: a, num_experts: 4, top_k: 1, max_experts: 6}], "
        "intermediate_size: 16}"
    )
    routing = {"capacity_factor": 1.5, "jitter": 0.1, "load": 0.02, "z": 0.002}

    def act(control: TrainerControl) -> None:
        assert trainer.boundary.expert_load is not None
        idle = int(trainer.boundary.expert_load[1, :4].argmin())
        every = one_of_each(Snapshot(1, 0), expert=idle)
        each = [one for one in every if not one.needed and type(one) is not Stop]
        for change in (
            *(one for one in each if type(one) is not CorrectLearningRate),  # it would be undone
            *(SetRouting(name, value) for name, value in routing.items()),
            SetRouting("expert_dropout", 0.1),
            SetEvaluation(3),
        ):
            control.request(change, reason="I want to")

    recorder = Recorder()
    trainer = make_trainer(
        ACT,
        experts,
        "model.mod={layers: all}",
        "training.max_steps=12",
        "training.schedule={type: wsd, warmup: 0, decay: 0}",
        "data.train=[{type: dummy, name: a}, {type: dummy, name: b, seed: 3}]",
        controllers=[At(step2=act, step9=asks(Stop()))],
        callbacks=[recorder],
    )
    trainer.fit()
    changed = {change.setting: change.after for change in recorder.changes}
    assert changed["weight_decay"] == 0.2
    assert changed["optimizer.betas"] == [0.8, 0.9]
    assert changed["mod.capacity"] == 0.25
    assert {name: changed[f"routing.{name}"] for name in routing} == pytest.approx(routing)
    assert changed["revive_experts"][0]["group"] == "a"
    assert {"add_expert", "prune_expert", "release_experts"} <= changed.keys()
    reported = read_decisions(trainer.run.decisions)
    assert [one["action"] for one in reported] == [change.setting for change in recorder.changes]
    assert {one["rule"] for one in reported} == {"by_hand"}
    assert {one["reasoning"] for one in reported[:-1]} == {"I want to"}
    rates = [report.lr / recorder.steps[0].lr for report in recorder.steps]
    eased = [0.5 ** (1 - past / 7) for past in range(7)]  # the factor of over_steps=7
    assert rates[2:9] == pytest.approx([0.7 * factor for factor in eased])
    assert [report.step for report in recorder.validations] == [3, 6, 9]
    betas = {group["betas"] for group in trainer.stepper.optimizers[0].param_groups}
    assert betas == {(0.8, 0.9)}
    orchestrator = orchestrator_of(trainer)
    assert orchestrator.throughput() > 0
    assert orchestrator.get_current_metrics()["loss"] == recorder.steps[-1].loss
    assert orchestrator.get_expert_statistics() is not None
    again = resume_trainer(trainer.run)
    assert {g["betas"] for g in again.stepper.optimizers[0].param_groups} == {(0.8, 0.9)}


def test_going_back_by_hand(make_trainer: MakeTrainer) -> None:
    done: list[int] = []

    def back(control: TrainerControl) -> None:
        if not done:
            done.append(1)
            orchestrator = orchestrator_of(trainer)
            with pytest.raises(UltrathinkError, match=r"last 8 steps before step 50;"):
                orchestrator.best_snapshot(last_steps=8)
            control.request(SetOptimizerOption("eps", 1e-3), reason="test")
            control.request(SetWeightDecay(0.3), reason="test")
            best = orchestrator.best_snapshot(last_steps=29)
            control.request(Rollback(best), reason="I did not like it")

    recorder = Recorder()
    trainer = make_trainer(*RUN, ACT, controllers=[At(step50=back)], callbacks=[recorder])
    trainer.fit()
    taken = [report.step for report in recorder.steps]
    assert taken[:50] == list(range(1, 51))
    assert taken[50] == 42  # of the snapshots of steps 21 and 41 the one with the lower loss
    assert trainer.loader.samples_skipped == 4 * (50 - 41)
    matrices = trainer.stepper.optimizers[0].param_groups[0]
    assert matrices["eps"] != 1e-3  # changed before the rollback, which took it back
    assert matrices["weight_decay"] != 0.3


def test_who_is_not_steered_says_so(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UltrathinkError, match=r"build it with orchestrator.mode=act"):
        orchestrator_of(make_trainer("training.max_steps=2"))
