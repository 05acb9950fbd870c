import json
import time
from typing import Any

import pytest

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, records, without_time
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training import length
from ultrathink.training.budget import MARGIN, Budget, Speed
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.changes import Rollback, Stop
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.trainer import Trainer


def test_minutes_become_steps_once_and_trying_out_leaves_no_trace(
    make_trainer: MakeTrainer, finished: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(length, "TRIAL_SHARE", 0.0)
    monkeypatch.setattr(Trainer, "settle_length", lambda trainer: None)  # tested below
    measure_speed = Trainer._measure_speed
    timed = make_trainer("training.max_minutes=10", "training.schedule.warmup=2")

    def measured(trainer: Trainer) -> Speed:
        """The steps are tried out for real; the figure is one that no machine can change."""
        assert measure_speed(trainer).step_s > 0
        return Speed(step_s=(600 * (1 - MARGIN) - 1) / 12)

    monkeypatch.setattr(Trainer, "_measure_speed", measured)
    assert timed.fit().name == "finished"
    config = timed.run.read_config()
    assert config.training.step_budget == 12
    assert config.origin("training.step_budget").startswith("chosen at run time")
    counted = finished("training.max_steps=12", "training.schedule.warmup=2")
    assert without_time(records(timed.run)) == without_time(records(counted.run))


def test_a_run_that_gets_slower_ends_on_the_minute(make_trainer: MakeTrainer) -> None:
    class Slow(Callback):
        def on_step(self, report: StepReport) -> None:
            time.sleep(0.1)

    trainer = make_trainer("training.max_minutes=0.04", callbacks=[Slow()])
    trainer.length.budget = Budget(total_steps=1000, tokens_per_step=128)  # from when it was faster
    assert trainer.fit().name == "out of time"
    assert 0 < trainer.progress.step < 1000
    assert trainer.run.steps()[-1] == trainer.progress.step
    shortest = make_trainer("training.max_minutes=1.0e-6")
    assert shortest.fit().name == "finished"
    assert shortest.run.steps() == [1]


@pytest.mark.parametrize("measured_s", [30.0, 0.0001])
def test_a_bad_moment_at_the_start_does_not_decide_the_length(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, measured_s: float
) -> None:
    """A machine that was busy, or idle, while the first steps were timed."""
    recorder = Recorder()
    trainer = make_trainer(
        "training.max_minutes=0.05", "training.schedule.warmup=1", callbacks=[recorder]
    )
    slow = Speed(step_s=measured_s, validation_s=measured_s)
    monkeypatch.setattr(Trainer, "_measure_speed", lambda trainer: slow)
    trainer.fit()
    assert trainer.length.budget is not None
    change = recorder.changes[0]
    assert change.setting == "training.step_budget"
    assert change.after > 10 if measured_s > 1 else change.after < change.before
    change = recorder.changes[-1]  # the first is coarse where steps take a thousandth of a second
    assert change.after == trainer.length.budget.total_steps
    assert change.after == trainer.run.read_config().training.step_budget
    assert 10 < trainer.progress.step <= change.after
    decisions = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
    assert {decision["action"] for decision in decisions} == {"training.step_budget"}
    after_warmup = [report.lr for report in recorder.steps[change.step + 1 :]]
    assert after_warmup == sorted(after_warmup, reverse=True)


def test_a_run_that_goes_back_has_fewer_steps_left_in_its_minutes(
    make_trainer: MakeTrainer,
) -> None:
    def gone_back(*words: str, **budget: Any) -> Trainer:
        trainer = make_trainer("training.schedule.warmup=2", *words)
        trainer.length.set(Budget(1000, tokens_per_step=128, **budget))
        trainer.snapshots.keep(0, trainer.state.copy(), in_checkpoints=False)
        Rollback(Snapshot(0, 0), skip_data=False).apply(trainer.parts)
        trainer.close()
        return trainer

    trainer = gone_back("training.max_minutes=10", seconds_per_step=1e-3, looks=4)
    trainer.progress.step, trainer.progress.elapsed_s = 100, 540.0
    trainer.clock.num_steps, trainer.clock.steps_s = 1000, 500.0
    trainer.settle_length()
    assert 150 < trainer.length.total_steps < 250  # a minute is left, of half a second a step
    fixed = gone_back("training.max_steps=1000").length.budget
    assert fixed is not None
    assert fixed.is_settled


def test_a_corrected_length_is_that_of_a_resumed_run_too(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = At(step60=asks(Stop()))
    trainer = make_trainer("training.max_minutes=0.1", controllers=[stop])
    monkeypatch.setattr(Trainer, "_measure_speed", lambda trainer: Speed(step_s=1.0))
    assert trainer.fit().name == "stopped"
    assert trainer.length.budget is not None
    resumed = resume_trainer(trainer.run)
    assert resumed.length.budget == trainer.length.budget
    assert resumed.length.budget.total_steps > 60
    resumed.close()
