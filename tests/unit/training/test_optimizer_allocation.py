"""The state of optimizers, allocated before their first step: the same as what that would make."""

from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE, ROUTING
from tests.unit.training.observers import At, asks, final_state
from ultrathink.config.optimizer import OPTIMIZERS
from ultrathink.training.changes import SetLearningRateFactor
from ultrathink.training.trainer import Trainer

CASES = {
    "dense": (),
    "experts": (*MIXTURE, ROUTING),
    "fp64": ("training.precision=fp64",),
    "offload": ("parallel.offload=optimizer",),
}


PAIRS = [
    (optimizer, case)
    for optimizer in OPTIMIZERS.names()
    for case in CASES
    if (optimizer, case) != ("muon", "offload")  # which is refused
]


def state(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    found: Any = trainer.state_dict()["optimizer"]
    return {name: dict(values) for name, values in found.items()}


def lazy(trainer: Trainer) -> Trainer:
    trainer.stepper.allocate_state = lambda: None  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(("optimizer", "case"), PAIRS)
def test_it_is_what_the_first_step_makes(
    make_trainer: MakeTrainer, optimizer: str, case: str
) -> None:
    words = (f"training.optimizer={{type: {optimizer}, lr: 0.01}}", *CASES[case])
    made = make_trainer(*words)
    made.stepper.allocate_state()
    before = state(made)
    made.stepper.allocate_state()  # what exists is kept
    after = state(made)
    assert all(after[name][key] is before[name][key] for name in before for key in before[name])
    stepped = make_trainer(*words)
    stepped.stepper.take_step(stepped.loader.next_batch(), stepped.settings, 1.0)
    zeros, real = state(made), state(stepped)
    assert zeros.keys() == real.keys() == dict(made.model.named_parameters()).keys()
    for name, values in real.items():
        assert zeros[name].keys() == values.keys()
        for key, value in values.items():
            zero = zeros[name][key]
            assert not zero.any()
            for what in ("dtype", "device", "shape", "requires_grad"):
                assert getattr(zero, what) == getattr(value, what), (name, key, what)
            assert zero.stride() == value.stride()


def test_it_is_there_before_the_first_batch(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in ("training.max_steps=4", "training.max_minutes=0.02"):
        trainer = make_trainer(length)
        seen: list[int] = []
        next_batch = trainer.loader.next_batch

        def watched(
            trainer: Trainer = trainer, seen: list[int] = seen, real: Any = next_batch
        ) -> Any:
            seen.append(len(state(trainer)))
            return real()

        monkeypatch.setattr(trainer.loader, "next_batch", watched)
        trainer.start()
        trainer.train_step()
        trainer.close()
        assert set(seen) == {len(list(trainer.model.parameters()))}


def test_a_step_left_out_at_first_changes_nothing(make_trainer: MakeTrainer) -> None:
    """Bias correction counts from the first update, however late that comes."""
    results = []
    for make in (lambda trainer: trainer, lazy):
        trainer = make(
            make_trainer(
                "training.max_steps=3",
                controllers=[At(step2=asks(SetLearningRateFactor(0.5)))],
            )
        )
        losses, calls = trainer.objective.sums, []

        def spoiled(*args: Any) -> Any:
            calls.append(1)  # noqa: B023
            sums = losses(*args)  # noqa: B023
            return sums._replace(loss=sums.loss * float("nan")) if len(calls) == 1 else sums  # noqa: B023

        trainer.objective.sums = spoiled
        trainer.fit()
        assert trainer.progress.num_skipped == 1
        results.append(final_state(trainer.run))
    one, other = results
    assert [name for name in other if not torch.equal(one[name], other[name])] == []
