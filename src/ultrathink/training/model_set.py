"""The modules of a run: trained ones and frozen ones."""

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
from ultrathink.training.compiling import EAGER, Compilation, refuse_selective

MAIN = "model"  # the module that is validated, exported and sampled from


class FrozenModel:
    """A model that is used but not trained, such as a teacher.

    It is in evaluation mode, so it draws no random numbers, and has a separate graph and
    precision. ``model`` may be sharded.
    """

    def __init__(self, model: Transformer, compilation: Compilation = EAGER) -> None:
        self.model = model.eval().requires_grad_(False)
        self._pass = compilation.of_pass(self._states)

    @contextmanager
    def states(
        self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized states ``[B, T, C]`` and the output projection ``[V, C]``, gathered inside."""
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
            head=lambda x, weight, *_: {"states": x, "weight": weight},
        )
        return output.head


@contextmanager
def inference_view(model: Transformer) -> Iterator[Transformer]:
    """``model`` for generation during training, which is not affected.

    A sharded model stays sharded, and its weights are gathered as in a step: all processes generate
    the same texts from the same seed.
    """
    before = random_state()
    try:
        yield model
    finally:
        release(model)
        set_random_state(before)


@dataclass(frozen=True)
class TrainedModule:
    """A trained module, with a backward pass in every micro-batch or in none.

    Call it through its ``forward`` only: sharded weights are gathered just inside it. No other
    module shares its parameters.
    """

    module: nn.Module
    lr_factor: float = 1.0
    """Factor of the learning rate of ``training.optimizer``."""
    weight_decay: float | None = None
    """Replaces that of ``training.optimizer``."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Precision of the products of its Transformers; auto is ``training.precision``. Weights are
    float32, or float64 for fp64."""
    accumulation: Accumulation | None = None
    """Accumulation of its gradients, if it is sharded."""


@dataclass(frozen=True)
class ModelSet:
    """The modules of a run, ready for this machine."""

    trained: Mapping[str, TrainedModule]  # ``MAIN`` first, then by the objective's names
    frozen: Mapping[str, FrozenModel] = field(default_factory=dict)  # by the objective's names
    frozen_hash: str | None = None  # of their weights, which checkpoints do not hold
    is_compiled: bool = False

    def __post_init__(self) -> None:
        assert next(iter(self.trained)) == MAIN, "the main module comes first"
        assert all(name.isidentifier() for name in self.trained), "names are part of tensor names"
        own = [p for one in self.trained.values() for p in one.module.parameters()]
        assert len(own) == len(set(own)), "modules share no parameters"

    @cached_property
    def main(self) -> Transformer:
        """The model that is validated, exported and sampled from."""
        return cast(Transformer, self.trained[MAIN].module)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All trained modules, by name."""
        return {name: one.module for name, one in self.trained.items()}

    @cached_property
    def beside(self) -> dict[str, nn.Module]:
        """The trained modules other than the main one, by name."""
        return {name: module for name, module in self.modules.items() if name != MAIN}

    @property
    def accumulations(self) -> list[Accumulation]:
        """The gradient accumulations of sharded modules."""
        found = [one.accumulation for one in self.trained.values()]
        return [one for one in found if one is not None]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in optimizer states: ``norm.weight`` in the main module,
        ``value/norm.weight`` in the module ``value``."""
        return {
            own if name == MAIN else f"{name}/{own}": parameter
            for name, module in self.modules.items()
            for own, parameter in module.named_parameters()
        }

    def train(self) -> None:
        """Set all trained modules to training mode."""
        for module in self.modules.values():
            module.train()

    def set_activation_checkpointing(self, mode: str) -> None:
        """Set the activation checkpointing of all trained modules from now on; ConfigError if they
        are compiled and it is selective."""
        if self.is_compiled:
            refuse_selective(mode)
        for module in self.modules.values():
            for model in transformers_in(module):
                model.set_activation_checkpointing(mode)
