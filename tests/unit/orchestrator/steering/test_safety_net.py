"""What does not help is taken back, and a run ends with its best weights."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.orchestrator.steering.broken_runs import ACT, RUN, decisions, steering_of
from tests.unit.training.conftest import MakeTrainer, make_trainer
from tests.unit.training.observers import At, Recorder, asks, final_state
from ultrathink.orchestrator.steering.proposals import HARD, Proposal
from ultrathink.orchestrator.steering.rules import Rule, Situation
from ultrathink.orchestrator.steering.safety_net import BASELINE
from ultrathink.recipes.parts.resume_plan import plan_resume
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.listing import summarize
from ultrathink.runs.reading import RunReader
from ultrathink.training.budget import is_over
from ultrathink.training.changes import SetLearningRateFactor, Stop
from ultrathink.training.trainer import Trainer

__all__ = ["make_trainer"]

ALONE = ("orchestrator.rules.roll_back=false", "orchestrator.rules.find_rate=false")

Make = Callable[..., Trainer]


@pytest.fixture
def make(make_trainer: MakeTrainer, tmp_path: Path) -> Make:
    """Makes trainers on text of which so much is ``held_out``, in several batches."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    lines = [" ".join(draw.choices(words, weights=range(1, 41), k=12)) for _ in range(600)]
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(lines))

    def make(*overrides: str, held_out: float = 0.2, **parts: Any) -> Trainer:
        source = f"{{type: text, path: {path}, val_fraction: {held_out}}}"
        few = "training.eval={every_steps: 10, batch_size: 8, max_tokens: 2048}"
        return make_trainer(*RUN, f"data.train=[{source}]", few, *overrides, **parts)

    return make


class Meddles(Rule):
    """Multiplies the rate after step 20, and would again and again."""

    name = "meddles"
    cool_down = 0

    def __init__(self, factor: float, judged_after: int | None = 10) -> None:
        self.factor = factor
        self.judged_after = judged_after

    def propose(self, now: Situation) -> Proposal | None:
        if now.step < 20 or now.settings.lr_factor != 1.0:
            return None
        change = SetLearningRateFactor(self.factor)
        return Proposal(
            self.name, HARD, 1.0, (change,), "test", {}, now.step, judged_after=self.judged_after
        )


def meddled(make: Make, rule: Meddles, *overrides: str, **parts: Any) -> Trainer:
    trainer = make(ACT, *ALONE, "training.max_steps=50", *overrides, **parts)
    steering_of(trainer).policy.rules.append(rule)
    return trainer


@pytest.mark.parametrize("held_out", [0.2, 0])
def test_what_does_harm_is_taken_back(make: Make, held_out: float) -> None:
    trainer = meddled(make, Meddles(1000.0), held_out=held_out)
    assert trainer.fit().name == "finished"
    [harm] = decisions(trainer, "meddles")  # and never again: it is spent
    [back] = decisions(trainer, "safety_net")
    assert (harm["step"], harm["outcome"]["resolved"]) == (20, False)
    assert harm["outcome"]["text"].endswith(": undone")
    assert (back["action"], back["after"]) == ("rollback", 20)
    assert back["before"] == (31 if held_out else 30)  # text is scored first
    assert ("smoothed training loss (no data.val)" in back["reasoning"]) is not bool(held_out)
    assert trainer.settings.lr_factor == 1.0


def test_what_does_good_is_kept_and_judging_it_leaves_no_trace(make: Make) -> None:
    states = []
    for judged_after in (10, None):
        trainer = meddled(make, Meddles(0.8, judged_after), "model.dropout=0.1")
        trainer.fit()
        states.append(final_state(trainer.run))
        assert decisions(trainer, "safety_net") == []
        if judged_after is not None:
            [kept] = decisions(trainer, "meddles")
            assert kept["outcome"]["resolved"] is True
            assert "held-out loss was" in kept["outcome"]["text"]
        assert BASELINE not in steering_of(trainer).snapshots.held  # type: ignore[union-attr]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("held_out", [0.2, 0])
def test_a_watch_continues_after_a_resume(make: Make, held_out: float) -> None:
    whole = meddled(make, Meddles(1000.0), held_out=held_out)
    whole.fit()
    expected = final_state(whole.run)
    for stopped_at in (25, 30):
        stop = At(**{f"step{stopped_at}": asks(Stop())})
        part = meddled(make, Meddles(1000.0), held_out=held_out, controllers=[stop])
        assert part.fit().name == "stopped"
        again = resume_trainer(part.run)
        steering_of(again).policy.rules.append(Meddles(1000.0))
        again.fit()
        state = final_state(again.run)
        assert all(torch.equal(expected[name], state[name]) for name in expected)
        reported = [[(one["step"], one["after"]) for one in _all(run)] for run in (whole, again)]
        assert reported[0] == reported[1] != []


def _all(trainer: Trainer) -> list[dict[str, Any]]:
    return decisions(trainer, "meddles", "safety_net")


# -- at the end ------------------------------------------------------------------------------------


def resets(begin: int, **options: Any) -> Callable[[Trainer], None]:
    """Sets options of the optimizer to a wrong value before each update from ``begin`` on."""

    def install(trainer: Trainer) -> None:
        def reset(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if trainer.progress.step + 1 < begin:
                return
            for group in optimizer.param_groups:
                for name, value in options.items():
                    group[name] = value

        for optimizer in trainer.stepper.optimizers:
            optimizer.register_step_pre_hook(reset)

    return install


DECAYS = resets(45, weight_decay=50.0)


@pytest.mark.parametrize("holds", ["snapshots", "checkpoints", "training loss"])
def test_a_run_that_ends_worse_returns_to_its_best(make: Make, holds: str) -> None:
    recorder = Recorder()
    trainer = make(
        ACT,
        *ALONE,
        *("orchestrator.snapshots.max_gib=0",) * (holds == "checkpoints"),
        "training.max_steps=80",
        held_out=0 if holds == "training loss" else 0.2,
        callbacks=[recorder],
    )
    DECAYS(trainer)
    ending, run = trainer.fit(), trainer.run
    step = trainer.progress.step
    assert ending.name == f"returned to step {step}"
    assert 20 <= step <= 45
    [decision] = decisions(trainer, "safety_net")
    assert (decision["action"], decision["before"], decision["after"]) == ("rollback", 80, step)
    assert [one["action"] for one in decision["also"]] == ["stop"]
    assert run.checkpoint("last") == run.step_path(step)
    assert max(run.steps()) == step
    if holds == "training loss":
        assert "(no data.val)" in decision["reasoning"]
    else:
        best = min(recorder.validations, key=lambda report: report.loss)
        assert best.step == step
        assert trainer.score().loss == best.loss
        assert RunReader(run).history()[-1].step == step
    summary = summarize(run, is_over)
    assert (summary.state, summary.step) == ("finished", step)
    # Over, however it is resumed, unless it is given more length.
    plan = plan_resume(run)
    assert plan.is_finished
    plan.release()
    again = resume_trainer(run)
    assert again.fit() == ending
    assert len(decisions(again, "safety_net")) == 1
    longer = resume_trainer(run, overrides=["training.max_steps=90"])
    assert longer.fit().name == "finished"
    assert longer.progress.step == 90


def test_a_run_that_may_not_go_back_does_not(make: Make) -> None:
    trainer = make(ACT, "training.max_steps=80", "orchestrator.limits.rollbacks=0")
    DECAYS(trainer)
    assert trainer.fit().name == "finished"


FAULTS = {
    "rate": resets(185, lr=1.0),
    "moments": resets(80, betas=(0.9, 0.3), lr=0.3),
    "decay": resets(80, weight_decay=50.0),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_cannot_be_repaired_costs_no_more_than_it_must(make: Make, fault: str) -> None:
    """A wrong option of the optimizer, set again at every step to the end of the run."""
    ends, bests = [], []
    for mode in ("act", "off"):
        recorder = Recorder()
        trainer = make(f"orchestrator.mode={mode}", "training.max_steps=200", callbacks=[recorder])
        FAULTS[fault](trainer)
        trainer.fit()
        ends.append(trainer.score().loss)
        bests.append(min(report.loss for report in recorder.validations))
    steered, alone = ends
    assert alone > 1.1 * bests[1], "the fault does harm"
    assert steered <= 1.02 * bests[0]
    assert steered <= 1.01 * alone
