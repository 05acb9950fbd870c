"""What processes that are steered together run."""

import torch

from tests.distributed.tasks import STEERED, new_trainer


def train_and_ruin(place: str, *overrides: str) -> tuple[str, str, float]:
    """Let weights decay to nothing after step 25 of a steered run; its folder, its ending and the
    loss that it ends with."""
    few = ("training.max_steps=45", "training.eval.every_steps=10")
    off = ("orchestrator.rules.roll_back=false", "orchestrator.rules.find_rate=false")
    trainer = new_trainer(place, *STEERED, *few, *off, *overrides)

    def decay(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups if trainer.progress.step > 25 else ():
            group["weight_decay"] = 50.0

    for optimizer in trainer.stepper.optimizers:
        optimizer.register_step_pre_hook(decay)
    ending = trainer.fit()
    return str(trainer.run.path), ending.name, trainer.score().loss
