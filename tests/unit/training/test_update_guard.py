"""A guard is asked before each update: it may clip it, leave it out, and it is in checkpoints."""

from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import (
    At,
    asks,
    assert_equal_tensors,
    final_state,
    goes_back,
    scale_loss,
)
from ultrathink.core.protocols import State
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.changes import Stop
from ultrathink.training.stepping import Verdict
from ultrathink.training.trainer import Trainer

FP64 = ("training.precision=fp64", "training.optimizer={type: adamw, lr: 0.01}")


class Asked:
    """Keeps what it is asked, and says what it was given to say."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = list(verdicts)
        self.seen: list[tuple[float, float]] = []

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        self.seen.append((step_loss, grad_norm))
        return self.verdicts.pop(0) if self.verdicts else Verdict()


class Counting(Asked):
    """One that remembers; it leaves out every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        self.count += 1
        return Verdict(skip=self.count % 3 == 0)

    def state_dict(self) -> State:
        return {"count": self.count}

    def load_state_dict(self, state: State) -> None:
        self.count = int(state["count"])  # type: ignore[arg-type]


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and all that the optimizers remember, copied."""
    state: dict[str, Any] = trainer.state.copy()
    found = {f"model/{name}": value for name, value in state["model"].items()}
    for name, values in state["optimizer"].items():
        found |= {f"{name}/{key}": value for key, value in values.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def test_it_is_asked_of_the_loss_and_the_norm_before_clipping(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*FP64, "training.clip=0.01")
    guard = Asked()
    trainer.set_guard(guard)
    result = trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
    assert guard.seen == [(result.loss, result.grad_norm)]
    assert result.grad_norm > 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_it_leaves_out_touches_nothing(
    make_trainer: MakeTrainer, optimizer: str
) -> None:
    trainer = make_trainer(f"training.optimizer={{type: {optimizer}, lr: 0.01}}")
    trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
    before = tensors(trainer)
    trainer.set_guard(Asked(Verdict(skip=True)))
    result = trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
    assert result.skipped
    assert_equal_tensors(tensors(trainer), before)
    assert all(parameter.grad is None for parameter in trainer.stepper.parameters)
    assert not trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0).skipped
    assert any(not torch.equal(value, before[name]) for name, value in tensors(trainer).items())


@pytest.mark.parametrize(
    ("configured", "asked", "applied"),
    [(None, 0.05, 0.05), (0.02, 0.05, 0.02), (0.05, 0.02, 0.02), (0.05, None, 0.05)],
)
def test_the_stricter_limit_holds(
    make_trainer: MakeTrainer, configured: float | None, asked: float | None, applied: float
) -> None:
    trainer = make_trainer(*FP64)
    trainer.settings.clip = configured
    trainer.set_guard(Asked(Verdict(clip=asked)))
    norms: list[float] = []

    def measure(*_: Any) -> None:
        gradients = [p.grad for p in trainer.stepper.parameters if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    trainer.stepper.optimizers[0].register_step_pre_hook(measure)
    trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
    assert norms == [pytest.approx(applied, rel=1e-4)]


def test_what_is_not_finite_is_left_out_without_asking(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    guard = Asked()
    trainer.set_guard(guard)
    scale_loss(trainer, [1], float("nan"))
    assert trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0).skipped
    assert guard.seen == []


def test_a_resumed_guard_continues_where_it_was(make_trainer: MakeTrainer) -> None:
    """Also if a start in between had no guard."""
    whole = make_trainer("training.max_steps=8")
    whole.set_guard(Counting())
    whole.fit()
    assert whole.progress.num_skipped == 2
    half = make_trainer("training.max_steps=8", controllers=[At(step4=asks(Stop()))])
    half.set_guard(Counting())
    half.fit()
    without = resume_trainer(half.run)
    assert without.state_dict()["guard"] == {"count": 4}
    without.close()
    again = resume_trainer(half.run)
    guard = Counting()
    again.set_guard(guard)
    assert guard.count == 4
    again.fit()
    assert guard.count == 8
    assert_equal_tensors(final_state(again.run), final_state(whole.run))


def test_a_rollback_takes_the_guard_back(make_trainer: MakeTrainer) -> None:
    guard = Counting()
    trainer = make_trainer("training.max_steps=6", controllers=[goes_back(kept=2, at=5)])
    trainer.set_guard(guard)
    trainer.fit()
    assert guard.count == 6  # and not 9
