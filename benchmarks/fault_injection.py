"""How a fault gets into a training run: the hook that faults are written for, and what calls it.

A fault is a class derived from ``Fault`` in a file that names it: ``FAULT = MyFault``.
In each step in which it is active its methods are called in this order: ``on_batch``,
``on_forward``, ``on_loss`` and ``on_gradient`` (for each micro-batch), ``before_update``. What
they were given they give back, changed or not. docs/faults.md shows one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultrathink.data.batch import Batch
from ultrathink.model.transformer import Transformer
from ultrathink.training.objectives.pretrain import Sums
from ultrathink.training.optimizers import Optimizers
from ultrathink.training.settings import LiveSettings
from ultrathink.training.stepping import StepResult
from ultrathink.training.trainer import Trainer

GROUPS = ("loss", "gradient", "experts", "data", "resources")
MOST_STEPS = 4  # a run that goes back again and again is ended after so many times its steps


@dataclass
class Moment:
    """What a fault may see and touch of the run that it is in."""

    model: Transformer
    optimizers: Optimizers
    generator: torch.Generator  # follows from the seed and the fault's name, and from nothing else
    vocab_size: int
    offset: int = -1  # steps since the first one that the fault may touch, which is 0
    num_active: int = 0  # steps in which it was active before this one


class Fault:
    """Something that goes wrong in training; created again for each run.

    ``follows`` says what a fault comes back with after a rollback. One of ``time`` happens once,
    independently of the training; one of ``data`` lies in the samples, and is met again with them.
    """

    name = ""
    group = "loss"  # one of GROUPS
    model = "dense"  # or "moe"
    num_steps: int | None = 1  # steps that it is active in; None: to the end of the run
    follows = "time"  # or "data"

    def is_active(self, offset: int) -> bool:
        """Whether it strikes in the step ``offset`` steps after the first that it may touch."""
        return offset >= 0 and (self.num_steps is None or offset < self.num_steps)

    def lr_factor(self, moment: Moment) -> float:
        """By what the learning rate of the schedule is multiplied."""
        return 1.0

    def on_batch(self, batch: Batch, moment: Moment) -> Batch:
        """The batch that is trained on in place of ``batch``; time spent here is the loader's."""
        return batch

    def on_forward(self, num_sequences: int, moment: Moment) -> None:
        """Comes before the forward pass of a micro-batch."""

    def on_loss(self, loss: Tensor, moment: Moment) -> Tensor:
        """The summed loss of a micro-batch, of which gradients are taken."""
        return loss

    def on_gradient(self, name: str, gradient: Tensor, moment: Moment) -> Tensor:
        """The gradient of the parameter ``name`` from one micro-batch."""
        return gradient

    def before_update(self, moment: Moment) -> None:
        """Comes before the optimizers change the weights."""

    def end(self) -> None:
        """The run is over, or died: give back what was taken from the process."""


class EndlessRunError(RuntimeError):
    """The run was set back so often that it does not come to its end."""


class Injection:
    """Puts ``fault`` into ``trainer``: from its step ``begin`` on, counted from 1.

    Without a fault it only watches that the run ends.
    """

    def __init__(self, trainer: Trainer, fault: Fault | None, *, begin: int, seed: int) -> None:
        self.fault = fault
        self._trainer = trainer
        self._begin = begin
        self._taken = trainer.progress.step  # steps, those that were undone included
        assert trainer.training.max_steps is not None, "runs of the benchmark are counted in steps"
        self._limit = MOST_STEPS * trainer.training.max_steps
        self._is_active = False
        name = fault.name if fault is not None else ""
        self.moment = Moment(
            model=trainer.model,
            optimizers=trainer.stepper.optimizers,
            generator=torch.Generator().manual_seed(drawn_number(name, seed)),
            vocab_size=int(trainer.config["model"]["vocab_size"]),
        )
        self._next_batch = trainer.loader.next_batch
        trainer.loader.next_batch = self._batch  # type: ignore[method-assign]
        if fault is not None:
            self._wrap_stepper(fault)

    def _wrap_stepper(self, fault: Fault) -> None:
        stepper, moment = self._trainer.stepper, self.moment
        objective: Any = self._trainer.objective
        inner_losses = objective.sums
        take_step = stepper.take_step

        def losses(input_ids: Tensor, *rest: Any) -> Sums:
            if not self._is_active:
                return inner_losses(input_ids, *rest)
            fault.on_forward(input_ids.shape[0], moment)
            sums = inner_losses(input_ids, *rest)
            return sums._replace(loss=fault.on_loss(sums.loss, moment))

        def faulty_step(
            batch: Batch, settings: LiveSettings, lr_factor: float, **rest: Any
        ) -> StepResult:
            return take_step(batch, settings, lr_factor * self._lr_factor(), **rest)

        def update(*_: Any) -> None:
            if self._is_active:
                fault.before_update(moment)

        objective.sums = losses
        stepper.take_step = faulty_step  # type: ignore[method-assign]
        stepper.optimizers[0].register_step_pre_hook(update)
        for name, parameter in moment.model.named_parameters():
            parameter.register_hook(self._gradient_hook(fault, name))

    def _gradient_hook(self, fault: Fault, name: str) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            if not self._is_active:
                return gradient
            return fault.on_gradient(name, gradient, self.moment)

        return hook

    def _lr_factor(self) -> float:
        assert self.fault is not None
        return self.fault.lr_factor(self.moment) if self._is_active else 1.0

    def _batch(self) -> Batch:
        """The next batch; what is active in its step is settled here."""
        if self._taken >= self._limit:
            raise EndlessRunError(f"{self._taken} steps were taken, and the run is not over")
        if self._is_active:
            self.moment.num_active += 1
        loader = self._trainer.loader
        samples = loader.samples_seen + loader.samples_skipped
        batch = self._next_batch()
        if self.fault is not None:
            is_of_data = self.fault.follows == "data"
            steps = samples // loader.batch_size if is_of_data else self._taken
            self.moment.offset = steps - (self._begin - 1)
            self._is_active = self.fault.is_active(self.moment.offset)
            if self._is_active:
                batch = self.fault.on_batch(batch, self.moment)
        self._taken += 1
        return batch


def drawn_number(name: str, seed: int) -> int:
    """A number below 2**31 that looks random, the same for the same name and seed."""
    number = 2166136261  # FNV-1a, 32 bit
    for byte in f"{name}/{seed}".encode():
        number = (number ^ byte) * 16777619 % 2**32
    return number >> 1
