"""Runs that are broken on purpose, under an orchestrator that acts."""

from typing import Any

import torch

from tests.unit.training.conftest import MakeTrainer
from ultrathink.orchestrator.steering.steering import Steering
from ultrathink.runs.decisions import read_decisions
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.trainer import Trainer

ACT = "orchestrator.mode=act"
RUN = (
    "training.max_steps=140",
    "training.optimizer={type: adamw, lr: 0.003}",
    "training.schedule={type: wsd, warmup: 10, decay: 20%}",
    "training.clip=null",
    "orchestrator.snapshots.every_steps=20",
)


class Breaks(Callback):
    """Does something to a trainer after a step, once."""

    def __init__(self, step: int, harm: Any) -> None:
        self.step = step
        self.harm = harm
        self.trainer: Trainer | None = None

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step and self.trainer is not None:
            trainer, self.trainer = self.trainer, None
            self.harm(trainer)


def scale_a_weight(trainer: Trainer) -> None:
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.ndim == 2).mul_(300.0)


def steering_of(trainer: Trainer) -> Steering:
    [found] = [one for one in trainer.controllers if isinstance(one, Steering)]
    return found


def broken_run(make: MakeTrainer, step: int, harm: Any, *overrides: str) -> Trainer:
    breaks = Breaks(step, harm)
    trainer = make(*RUN, *overrides, callbacks=[breaks])
    breaks.trainer = trainer
    trainer.fit()
    return trainer


def decisions(trainer: Trainer, *rules: str) -> list[dict[str, Any]]:
    return [one for one in read_decisions(trainer.run.decisions) if one["rule"] in rules]
