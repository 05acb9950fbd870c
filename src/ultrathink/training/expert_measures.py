"""Measures the experts of a training model on the batch of the last step.

One forward pass in evaluation mode, in micro-batches: it draws no random numbers, drops no tokens
and uses the current weights. All processes run it on their shares and get the same sums.

Shapes: L layers with experts, E slots for experts, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultrathink.model.experts.salience import Contributions, contributions
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.sharding import release
from ultrathink.training.parts import Parts


@dataclass(frozen=True)
class Measures:
    """How the experts did on a batch; tensors are float64, on the CPU."""

    loss: float
    """Mean cross-entropy over the trained tokens, nats."""

    tokens: Tensor
    """``[L, E]``: trained tokens sent to each expert."""

    salience: Tensor
    """``[L, E]``: mean gated norm of an expert's output (``salience.py``); 0 without tokens."""

    inputs: Tensor
    """``[L, E, C]``: mean state of those tokens; 0 without tokens."""


@torch.no_grad()
def measure_experts(run: Parts) -> Measures | None:
    """Measure on the last batch; None if this process has taken no step yet."""
    batch, model = run.boundary.batch, run.model
    if batch is None:
        return None
    objective = run.stepper.objective
    sums: list[Contributions] = []
    loss = num_tokens = 0.0
    was_training = model.training
    model.eval()
    try:
        for part in batch.split(run.settings.micro_batch_size):
            input_ids, labels = part.on(objective.device, "input_ids", "targets")
            inside: dict[str, Tensor] = {}
            if objective.isolate_documents:
                names = ("positions", "document_ids")
                inside = dict(zip(names, part.on(objective.device, *names), strict=True))
            with _watched(model) as found:
                output = model(input_ids, labels, **inside)
            sums.append(_stacked(found))
            loss += float(output.loss)
            num_tokens += float(output.num_tokens)
    finally:
        model.train(was_training)
        release(model)
    tokens, norms, inputs = (
        run.dp_group.summed(torch.stack(parts).sum(0)).cpu() for parts in zip(*sums, strict=True)
    )
    loss, num_tokens = run.dp_group.sums([loss, num_tokens])
    counts = tokens.clamp(min=1)
    return Measures(loss / max(1.0, num_tokens), tokens, norms / counts, inputs / counts[..., None])


def _stacked(layers: Sequence[Contributions]) -> Contributions:
    """The contributions of all layers, each with L in front."""
    return Contributions(*map(torch.stack, zip(*layers, strict=True)))


@contextmanager
def _watched(model: Transformer) -> Iterator[list[Contributions]]:
    """Inside, each layer's contributions are added to the list, in the order of the layers.

    Hooks, because the weights of sharded experts are gathered only inside their own call. Only
    trained tokens count, and of these only those that go through the layer.
    """
    found: list[Contributions] = []
    counted: list[Tensor] = []  # of the layer that runs

    def note(_: Any, inputs: tuple[Any, ...]) -> None:
        _, routing = inputs
        counted[:] = [routing.sequences.counted.flatten() > 0]

    def observe(experts: Any, inputs: tuple[Any, ...]) -> None:
        x, choice, _ = inputs
        found.append(contributions(experts, x, choice, counted[0]))

    handles = []
    for layer in model.expert_layers().values():
        handles.append(layer.register_forward_pre_hook(note))
        handles.append(layer.experts.register_forward_pre_hook(observe))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
