"""Passes that need more memory than there is: torch's own allocator refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultrathink.training.objectives.pretrain import Sums
from ultrathink.training.trainer import Trainer

MORE_THAN_ANY = 1 << 60  # bytes, beyond every address space


def run_out_of_memory() -> None:
    torch.empty(MORE_THAN_ANY, dtype=torch.uint8)


class _Needing(torch.autograd.Function):
    """The identity, whose backward pass does not fit."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        run_out_of_memory()
        return gradients[0]


class LimitedMemory:
    """Makes passes over more than ``fits`` sequences fail in ``trainer``, ``where`` asked.

    The first ``after`` micro-batches succeed at any size. ``tried`` are the sizes
    of all passes.
    """

    def __init__(self, trainer: Trainer, fits: int, where: str = "forward", after: int = 0) -> None:
        self.tried: list[int] = []
        self._inner = trainer.objective.sums
        self.fits, self._where, self._after = fits, where, after
        trainer.objective.sums = self._losses

    def _losses(self, input_ids: Tensor, *rest: Any) -> Sums:
        self.tried.append(len(input_ids))
        fails = len(input_ids) > self.fits and len(self.tried) > self._after
        if fails and self._where == "forward":
            self._inner(input_ids, *rest)  # which draws random numbers
            run_out_of_memory()
        sums = self._inner(input_ids, *rest)
        if fails:
            loss: Tensor = _Needing.apply(sums.loss)
            return sums._replace(loss=loss)
        return sums


def keep_gradients(trainer: Trainer, into: dict[str, Tensor]) -> None:
    """Keep the gradients of the first step, as the optimizers get them."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    into.setdefault(names[weight], weight.grad.clone())

    for optimizer in trainer.stepper.optimizers:
        optimizer.register_step_pre_hook(keep)


def assert_same_gradients(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """To 1e-6: of one where numbers are smaller."""
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-6 * max(1.0, float(gradient.abs().max()))
        )
