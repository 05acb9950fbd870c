import pytest

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import Recorder
from ultrathink.training.callbacks import StepReport
from ultrathink.training.endings import FINISHED, Ending
from ultrathink.training.trainer import Trainer


class _Ends(Recorder):
    """Ends its run after step 2."""

    trainer: Trainer

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.ending = ending

    def on_step(self, report: StepReport) -> None:
        super().on_step(report)
        if report.step == 2:
            self.trainer.boundary.ending = self.ending


@pytest.mark.parametrize("can_resume", [True, False])
def test_an_ending_that_nobody_knows_counts_by_its_rule(
    make_trainer: MakeTrainer, can_resume: bool
) -> None:
    """One that leaves nothing to go on with is validated and lets the model write."""
    ending = Ending("returned to step 1", can_resume=can_resume, reason="it was the best")
    ends = _Ends(ending)
    trainer = make_trainer(
        "training.max_steps=9",
        "training.sample.prompts=['the ']",
        "training.eval.every_steps=null",
        callbacks=[ends],
    )
    ends.trainer = trainer
    assert trainer.fit() is ending
    assert str(ending) == "returned to step 1 (it was the best)"
    assert [one.step for one in ends.validations] == ([] if can_resume else [2])
    assert (trainer.run.path / "samples.jsonl").exists() != can_resume
    assert trainer.run.steps() == [2]


def test_endings_of_one_name_are_equal_whatever_led_to_them() -> None:
    assert Ending("finished", can_resume=False, reason="a test") == FINISHED
