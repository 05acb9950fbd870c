import time

import pytest

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import records, without_time
from ultrathink.training import trainer as trainer_module
from ultrathink.training.budget import MARGIN, Budget, Speed
from ultrathink.training.callbacks import Callback, StepReport


def test_minutes_become_steps_once_and_trying_out_leaves_no_trace(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "_TRIAL_SHARE", 0.0)
    timed = make_trainer("training.max_minutes=10", "training.schedule.warmup=2")
    measure = timed._measure_speed

    def measured() -> Speed:
        """The steps are tried out for real; the figure is one that no machine can change."""
        assert measure().step_s > 0
        return Speed(step_s=(600 * (1 - MARGIN) - 1) / 12)

    monkeypatch.setattr(timed, "_measure_speed", measured)
    assert timed.fit() == "finished"
    config = timed.run.read_config()
    assert config.training.step_budget == 12
    assert config.origin("training.step_budget").startswith("chosen at run time")
    counted = make_trainer("training.max_steps=12", "training.schedule.warmup=2")
    counted.fit()
    assert without_time(records(timed.run)) == without_time(records(counted.run))


def test_a_run_that_gets_slower_ends_on_the_minute(make_trainer: MakeTrainer) -> None:
    class Slow(Callback):
        def on_step(self, report: StepReport) -> None:
            time.sleep(0.1)

    trainer = make_trainer("training.max_minutes=0.04", callbacks=[Slow()])
    trainer.budget = Budget(total_steps=1000, tokens_per_step=128)  # from when it was faster
    assert trainer.fit() == "out of time"
    assert 0 < trainer.progress.step < 1000
    assert trainer.run.steps()[-1] == trainer.progress.step


def test_the_shortest_time_still_takes_a_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_minutes=1.0e-6")
    assert trainer.fit() == "finished"
    assert trainer.run.steps() == [1]
