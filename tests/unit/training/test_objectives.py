"""What the trainer and the step ask of an objective, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.limited_memory import LimitedMemory
from tests.unit.training.observers import records
from ultrathink import load_model, resume_trainer
from ultrathink.checkpoint.format import Header, read_header
from ultrathink.config.objective import OBJECTIVES, ObjectiveConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.data.batch import Batch
from ultrathink.interop.export import export_run
from ultrathink.orchestrator.live import LiveWatch
from ultrathink.training.objectives.base import Losses, Term
from ultrathink.training.objectives.pretrain import Pretraining
from ultrathink.training.trainer import Trainer

FP64 = "training.precision=fp64"


class BonusConfig(ObjectiveConfig):
    """Options of ``Bonus``."""

    type: Literal["bonus", "probing"] = "bonus"


class Bonus(Pretraining):
    """A term that is counted by sequences, beside those of text; keeps what it is asked for."""

    best_by: ClassVar[Mapping[str, int]] = {"loss": -1, "ppl": 1}
    without_detectors: ClassVar[frozenset[str]] = frozenset({"LossSpike"})
    is_guarded: ClassVar[bool] = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[str] = []
        self.weight = torch.tensor(0.5, dtype=torch.float64)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.calls.append(f"before {step}")

    def prepare(self, batch: Batch, step: int) -> Batch:
        self.calls.append(f"prepare {step}")
        return batch

    def counts(self, batch: Batch) -> dict[str, float]:
        return {**super().counts(batch), "sequences": batch.num_sequences}

    def losses(self, batch: Batch) -> Losses:
        self.calls.append(f"losses {batch.num_sequences}")
        losses = super().losses(batch)
        bonus = batch.num_sequences * self.model.norm.weight.sum()
        losses.terms["bonus"] = Term(bonus, self.weight, per="sequences")
        return losses

    def after_update(self, stats: Mapping[str, Tensor], summed: Callable[[Tensor], Tensor]) -> None:
        self.calls.append("after")


class Probing(Bonus):
    """Trains what is no model of its own."""

    kind = "probe"

    @property
    def header(self) -> Header:
        return Header(self.kind, "0123456789abcdef")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    OBJECTIVES.add("bonus", Bonus, options=BonusConfig)
    OBJECTIVES.add("probing", Probing, options=BonusConfig)
    yield
    del OBJECTIVES._entries["bonus"], OBJECTIVES._entries["probing"]


def norm_gradient(trainer: Trainer) -> tuple[Tensor, dict[str, float]]:
    """The gradient of the last norm in a step, and the other losses that it reports."""
    found: list[Tensor] = []
    weight = trainer.model.norm.weight
    trainer.stepper.optimizers[0].register_step_pre_hook(
        lambda *_: found.append(weight.grad.clone())  # type: ignore[union-attr]
    )
    result = trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
    return found[0], result.aux_losses


@pytest.mark.parametrize("micro", [4, 3, 1])
def test_each_term_has_its_denominator_and_a_weight_that_is_read(
    make_trainer: MakeTrainer, micro: int
) -> None:
    words = (FP64, "training.clip=null", "training.batch_size=12")
    plain, _ = norm_gradient(make_trainer(*words))
    trainer = make_trainer(*words, "training.objective=bonus", f"training.micro_batch_size={micro}")
    with_bonus, reported = norm_gradient(trainer)
    torch.testing.assert_close(with_bonus - plain, torch.full_like(plain, 0.5))
    assert reported == {"bonus": pytest.approx(32.0)}  # unweighted
    again = make_trainer(*words, "training.objective=bonus", f"training.micro_batch_size={micro}")
    assert isinstance(again.objective, Bonus)
    again.objective.weight.fill_(3.0)
    torch.testing.assert_close(norm_gradient(again)[0] - plain, torch.full_like(plain, 3.0))


def test_a_batch_is_prepared_once_whatever_memory_there_is(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.objective=bonus", "training.micro_batch_size=4")
    assert isinstance(trainer.objective, Bonus)
    LimitedMemory(trainer, fits=2)
    trainer.start()
    for _ in range(2):
        trainer.train_step()
    trainer.close()
    first = ["before 1", "prepare 1", "losses 4", "losses 2", "losses 2", "after"]
    assert trainer.objective.calls == [*first, "before 2", "prepare 2", *first[3:]]


def test_an_objective_says_what_applies_to_it(make_trainer: MakeTrainer) -> None:
    words = ("orchestrator.mode=act", "training.checkpoint.best_by=ppl", "training.max_steps=4")
    trainer = make_trainer(*words, "training.objective=bonus", "training.eval.every_steps=1")
    [watch] = [part for part in trainer.callbacks if isinstance(part, LiveWatch)]
    names = set(watch.watcher.detectors)
    assert "LossSpike" not in names
    assert "Divergence" in names
    assert trainer.stepper.guard is None
    trainer.fit()
    perplexities = [row["ppl"] for row in records(trainer.run) if row["split"] == "val"]
    assert trainer.progress.best == max(perplexities)  # as the objective says
    assert make_trainer("orchestrator.mode=act").stepper.guard is not None


def test_its_checkpoints_say_of_what_kind_they_are(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.objective=probing", "training.max_steps=2")
    trainer.fit()
    run = trainer.run
    assert read_header(run.checkpoint("last")) == Header("probe", "0123456789abcdef")
    for refuse in (load_model, export_run):
        with pytest.raises(CheckpointError, match="is of kind 'probe', made for the model 012345"):
            refuse(run.path)
    longer = resume_trainer(run, overrides=["training.max_steps=3"])
    longer.fit()
    assert longer.progress.step == 3
    with pytest.raises(CheckpointError, match=r"'probe', made for .* needs kind 'model'"):
        resume_trainer(run, overrides=["training.max_steps=4", "training.objective=pretrain"])
