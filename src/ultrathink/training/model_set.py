"""The modules of a run: those that are trained, and those that are only asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ultrathink.core.random import random_state, set_random_state
from ultrathink.model.output import ModelOutput
from ultrathink.model.transformer import Transformer, transformers_in
from ultrathink.parallel.sharding import Accumulation, release
from ultrathink.training.compiling import EAGER, Compilation

MAIN = "model"  # the module that is validated, exported and written with


class FrozenModel:
    """A model that is asked and never changed, such as a teacher.

    It is in evaluation mode, so it draws no random numbers, and has a graph and a precision of its
    own. ``model`` may be divided among processes.
    """

    def __init__(self, model: Transformer, compilation: Compilation = EAGER) -> None:
        self.model = model.eval().requires_grad_(False)
        self._pass = compilation.of_pass(self._states)

    @contextmanager
    def states(
        self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized states ``[B, T, C]`` and the output projection ``[V, C]``, whole within."""
        try:
            with torch.no_grad():
                found = self._pass(input_ids, positions, document_ids)
            yield found["states"], found["weight"]
        finally:
            release(self.model)

    def _states(
        self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None
    ) -> dict[str, Tensor]:
        output: ModelOutput = self.model(
            input_ids,
            positions=positions,
            document_ids=document_ids,
            head=lambda x, weight, _: {"states": x, "weight": weight},
        )
        return output.head


@contextmanager
def inference_view(model: Transformer) -> Iterator[Transformer]:
    """``model`` to generate from amid training, which goes on as if nothing had been.

    Where it is divided among processes it stays so, and weights are gathered as in a step: all
    processes generate the same texts, from the same seed.
    """
    before = random_state()
    try:
        yield model
    finally:
        release(model)
        set_random_state(before)


@dataclass(frozen=True)
class TrainedModule:
    """A module that is trained, with a backward pass in each micro-batch or in none.

    It is called as a whole, by its ``forward``: divided weights are whole inside it only. Its
    parameters are nobody else's.
    """

    module: nn.Module
    lr_factor: float = 1.0
    """Of the learning rate that ``training.optimizer`` gives its parameters."""
    weight_decay: float | None = None
    """In place of that of ``training.optimizer``."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Of the products of Transformers in it; auto is ``training.precision``. Weights are float32,
    or float64 where it is fp64."""
    accumulation: Accumulation | None = None
    """Of its gradients, where it is divided among processes."""


@dataclass(frozen=True)
class ModelSet:
    """The modules of a run, ready for this machine."""

    trained: Mapping[str, TrainedModule]  # ``MAIN`` first, then by the objective's names
    frozen: Mapping[str, FrozenModel] = field(default_factory=dict)  # by the objective's names
    frozen_hash: str | None = None  # of their weights, which checkpoints do not hold

    def __post_init__(self) -> None:
        assert next(iter(self.trained)) == MAIN, "the main module comes first"
        assert all(name.isidentifier() for name in self.trained), "names are part of tensors' names"
        own = [p for one in self.trained.values() for p in one.module.parameters()]
        assert len(own) == len(set(own)), "no two modules have a parameter in common"

    @cached_property
    def main(self) -> Transformer:
        """The model that is validated, exported and written with."""
        return cast(Transformer, self.trained[MAIN].module)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All that is trained, by name."""
        return {name: one.module for name, one in self.trained.items()}

    @cached_property
    def beside(self) -> dict[str, nn.Module]:
        """What is trained beside the main one, by name."""
        return {name: module for name, module in self.modules.items() if name != MAIN}

    @property
    def accumulations(self) -> list[Accumulation]:
        """Of all that is trained; none where nothing is divided."""
        found = [one.accumulation for one in self.trained.values()]
        return [one for one in found if one is not None]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by the names that optimizers' states have: ``norm.weight`` of the main module,
        ``value/norm.weight`` of one that is called ``value``."""
        return {
            own if name == MAIN else f"{name}/{own}": parameter
            for name, module in self.modules.items()
            for own, parameter in module.named_parameters()
        }

    def train(self) -> None:
        """Let all that is trained be in training mode."""
        for module in self.modules.values():
            module.train()

    def set_activation_checkpointing(self, mode: str) -> None:
        """Keep every activation of what is trained, or fewer, from here on."""
        for module in self.modules.values():
            for model in transformers_in(module):
                model.set_activation_checkpointing(mode)
