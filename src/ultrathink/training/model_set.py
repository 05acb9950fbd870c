"""The models of a run: the one that is trained, and those that are only asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ultrathink.core.random import random_state, set_random_state
from ultrathink.model.output import ModelOutput
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.sharding import Accumulation, release
from ultrathink.training.compiling import EAGER, Compilation


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
class ModelSet:
    """The models of a run, ready for this machine."""

    trained: Transformer
    accumulation: Accumulation | None = None  # of its gradients, where it is divided
    frozen: Mapping[str, FrozenModel] = field(default_factory=dict)  # by the objective's names
    frozen_hash: str | None = None  # of their weights, which checkpoints do not hold
