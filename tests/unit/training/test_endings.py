import pytest

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder
from ultrathink.training.endings import Ending


@pytest.mark.parametrize("can_resume", [True, False])
def test_an_ending_that_nobody_knows_counts_by_its_rule(
    make_trainer: MakeTrainer, can_resume: bool
) -> None:
    """One that leaves nothing to go on with is validated and lets the model write."""
    ending = Ending("returned to step 1", can_resume=can_resume, reason="it was the best")
    recorder = Recorder()

    def end(_: object) -> None:
        trainer.boundary.ending = ending

    trainer = make_trainer(
        "training.max_steps=9",
        "training.sample.prompts=['the ']",
        "training.eval.every_steps=null",
        callbacks=[recorder],
        controllers=[At(step2=end)],
    )
    assert trainer.fit() is ending
    assert str(ending) == "returned to step 1 (it was the best)"
    assert [one.step for one in recorder.validations] == ([] if can_resume else [2])
    assert (trainer.run.path / "samples.jsonl").exists() != can_resume
    assert trainer.run.steps() == [2]
    assert Ending(ending.name, can_resume=can_resume) == ending  # whatever led to it
