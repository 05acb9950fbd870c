"""The states of a model, of its optimizers and of the settings applied to both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultrathink.core.divisors import largest_divisor
from ultrathink.core.protocols import State
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.placement import placed_like, region_of
from ultrathink.training.optimizers import (
    Optimizers,
    load_optimizer_state,
    optimizer_state,
    placed_values,
    set_option,
)
from ultrathink.training.settings import LiveSettings
from ultrathink.training.stepping import Step


@dataclass(frozen=True)
class ModelState:
    """The weights and buffers of ``model``, divided among processes as it is."""

    model: nn.Module

    def state_dict(self) -> State:
        return dict(self.model.state_dict())

    def load_state_dict(self, state: State) -> None:
        weights, values = self.model.state_dict(), cast(dict[str, Tensor], state)
        placed = {name: placed_like(value, weights[name]) for name, value in values.items()}
        self.model.load_state_dict(placed)


@dataclass(frozen=True)
class OptimizerState:
    """What the optimizers of ``stepper`` remember; to be loaded after the weights."""

    stepper: Step

    def state_dict(self) -> State:
        stepper = self.stepper
        return optimizer_state(stepper.optimizers, stepper.objective.model, stepper.host_names)

    def load_state_dict(self, state: State) -> None:
        stepper = self.stepper
        load_optimizer_state(stepper.optimizers, stepper.objective.model, state, stepper.host_names)
        if stepper.host is not None:
            stepper.host.take_weights()


@dataclass(frozen=True)
class SettingsState:
    """Live settings, and the model and optimizers that some of them are applied to.

    ``share`` is how many sequences of a batch this process has.
    """

    settings: LiveSettings
    model: Transformer
    optimizers: Optimizers
    share: int

    def state_dict(self) -> State:
        return self.settings.state_dict()

    def load_state_dict(self, state: State) -> None:
        for name, (configured, _) in self.settings.optimizer_params.items():
            set_option(self.optimizers, name, configured)
        self.settings.load_state_dict(state)
        for name, (_, current) in self.settings.optimizer_params.items():
            set_option(self.optimizers, name, current)
        self.model.set_activation_checkpointing(self.settings.activation_checkpointing)
        self.fit_micro_batch()  # it may be from when there were more processes

    def roll_back(self, state: State) -> None:
        """Go back, except for what spares memory: that is the machine's matter, not history's."""
        values: dict[str, Any] = dict(state)
        values["micro_batch_size"] = min(self.settings.micro_batch_size, values["micro_batch_size"])
        values["activation_checkpointing"] = self.settings.activation_checkpointing
        self.load_state_dict(values)

    def fit_micro_batch(self) -> None:
        """Let micro-batches divide this process's share of the batch, however many there were."""
        size = largest_divisor(self.share, self.settings.micro_batch_size)
        self.settings.micro_batch_size = size


@torch.no_grad()
def average_weights(model: nn.Module, others: Sequence[Mapping[str, Any]]) -> None:
    """Give ``model`` the mean of its parameters and ``others``, by name, wherever those lie."""
    for name, parameter in model.named_parameters():
        for other in others:
            parameter.add_(placed_like(other[name], parameter).to(parameter.device))
        parameter.div_(len(others) + 1)


def placed_state(
    state: Mapping[str, Any], model: nn.Module, copies: Mapping[Tensor, str]
) -> dict[str, Any]:
    """``state``, as read for this process, on the host and divided as the run's own state is.

    ``copies`` are names of tensors that are moved in place of parameters.
    """
    weights = model.state_dict()
    moved: dict[str, Tensor] = dict(model.named_parameters())
    moved |= {name: copy for copy, name in copies.items()}
    return {
        **state,
        "model": {
            name: placed_like(value, weights[name], is_for_host=True)
            for name, value in state["model"].items()
        },
        "optimizer": {
            name: placed_values(remembered, moved[name], is_for_host=True)
            for name, remembered in state.get("optimizer", {}).items()
        },
    }


def region_needed(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
    """Which part of a tensor of a checkpoint this process needs; None: all of it."""
    kind, _, inside = name.partition("/")
    weight = inside if kind == "model" else inside.rpartition("/")[0]
    reference: Tensor | None = dict(model.named_parameters()).get(weight)
    if isinstance(reference, DTensor) and tuple(reference.shape) == shape:
        return region_of(reference)
    return None
