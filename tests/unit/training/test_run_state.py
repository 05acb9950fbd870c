from typing import Any

import pytest

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At
from ultrathink.core.errors import CheckpointError
from ultrathink.core.protocols import State
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.changes import Rollback
from ultrathink.training.control import TrainerControl
from ultrathink.training.run_state import RunState
from ultrathink.training.snapshots import Snapshot


class Counter(Callback):
    """Counts steps; those that are undone stay counted unless it ``forgets``."""

    def __init__(self, *, forgets: bool = True) -> None:
        self.count = 0
        self.forgets = forgets

    def on_step(self, report: StepReport) -> None:
        self.count += 1

    def state_dict(self) -> State:
        return {"count": self.count}

    def load_state_dict(self, state: State) -> None:
        self.count = state["count"]  # type: ignore[assignment]

    def roll_back(self, state: State) -> None:
        if self.forgets:
            super().roll_back(state)


def test_the_state_of_a_part_that_is_not_there_is_kept_and_waits_for_it() -> None:
    first, number = RunState(), Counter()
    number.count = 7
    first.register_one_of("callback", number)
    first.register_one_of("callback", Counter())
    first.register("facts", lambda: {"a": 1}, lambda state: None)
    later = RunState()
    later.load_state_dict(first.state_dict())
    assert later.state_dict() == first.state_dict()
    found: list[Any] = []
    later.register("facts", lambda: found[0], found.append)
    again = Counter()
    later.register_one_of("callback", again)
    assert (again.count, found) == (7, [{"a": 1}])
    assert later.state_dict() == first.state_dict()
    later.register("model", dict, lambda state: None, is_required=True)
    with pytest.raises(CheckpointError, match="has no 'model'"):
        later.load_state_dict(first.state_dict())


def test_a_callback_that_one_start_lacks_continues_where_it_was(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_steps=3", callbacks=[Counter()])
    trainer.fit()
    resume_trainer(trainer.run, overrides=["training.max_steps=5"]).fit()
    counter = Counter()
    resume_trainer(trainer.run, overrides=["training.max_steps=7"], callbacks=[counter]).fit()
    assert counter.count == 3 + 2


def test_each_part_says_what_a_rollback_does_to_it(make_trainer: MakeTrainer) -> None:
    kept: list[Snapshot] = []

    def back(control: TrainerControl) -> None:
        if kept:
            control.request(Rollback(kept.pop(), skip_data=False), reason="test")

    forgetful, faithful = Counter(), Counter(forgets=False)
    trainer = make_trainer(
        "training.max_steps=6",
        callbacks=[forgetful, faithful],
        controllers=[At(step2=lambda control: kept.append(control.snapshot()), step4=back)],
    )
    trainer.fit()
    assert (forgetful.count, faithful.count) == (6, 8)
