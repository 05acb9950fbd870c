"""The states of trained modules, of their optimizers, and of the live settings of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultrathink.core.divisors import largest_divisor
from ultrathink.core.protocols import State
from ultrathink.parallel.placement import placed_like, region_of
from ultrathink.training.model_set import MAIN, ModelSet
from ultrathink.training.optimizers import (
    Optimizers,
    load_optimizer_state,
    optimizer_state,
    placed_values,
    set_option,
)
from ultrathink.training.settings import LiveSettings
from ultrathink.training.stepping import Step

MODULES = "modules"  # in a run's state, the trained modules other than the main model


@dataclass(frozen=True)
class ModelState:
    """The weights and buffers of ``model``, sharded as it is."""

    model: nn.Module

    def state_dict(self) -> State:
        return dict(self.model.state_dict())

    def load_state_dict(self, state: State) -> None:
        weights, values = self.model.state_dict(), cast(dict[str, Tensor], state)
        placed = {name: placed_like(value, weights[name]) for name, value in values.items()}
        self.model.load_state_dict(placed)


@dataclass(frozen=True)
class ModulesState:
    """The weights and buffers of several modules, by name."""

    modules: Mapping[str, nn.Module]

    def state_dict(self) -> State:
        return {name: ModelState(module).state_dict() for name, module in self.modules.items()}

    def load_state_dict(self, state: State) -> None:
        for name, module in self.modules.items():
            ModelState(module).load_state_dict(cast(State, state[name]))


@dataclass(frozen=True)
class OptimizerState:
    """The states of the optimizers of ``stepper``; load them after the weights."""

    stepper: Step

    def state_dict(self) -> State:
        stepper = self.stepper
        parameters = stepper.objective.models.named_parameters()
        return optimizer_state(stepper.optimizers, parameters, stepper.host_names)

    def load_state_dict(self, state: State) -> None:
        stepper = self.stepper
        parameters = stepper.objective.models.named_parameters()
        load_optimizer_state(stepper.optimizers, parameters, state, stepper.host_names)
        if stepper.host is not None:
            stepper.host.take_weights()


@dataclass(frozen=True)
class SettingsState:
    """Live settings, and the models and optimizers that they apply to.

    ``share`` is the number of sequences of a batch on this process.
    """

    settings: LiveSettings
    models: ModelSet
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
        self.models.set_activation_checkpointing(self.settings.activation_checkpointing)
        # There may have been another number of processes.
        size = largest_divisor(self.share, self.settings.micro_batch_size)
        self.settings.micro_batch_size = size

    def roll_back(self, state: State) -> None:
        """Roll back, except for settings that save memory: those depend on the machine."""
        values: dict[str, Any] = dict(state)
        values["micro_batch_size"] = min(self.settings.micro_batch_size, values["micro_batch_size"])
        values["activation_checkpointing"] = self.settings.activation_checkpointing
        self.load_state_dict(values)


@torch.no_grad()
def average_weights(modules: Mapping[str, nn.Module], states: Sequence[Mapping[str, Any]]) -> None:
    """Set the parameters of ``modules`` to the mean of theirs and those in ``states``.

    The states may be on any device.
    """
    for module_name, module in modules.items():
        others = [_weights(state)[module_name] for state in states]
        for name, parameter in module.named_parameters():
            for other in others:
                parameter.add_(placed_like(other[name], parameter).to(parameter.device))
            parameter.div_(len(others) + 1)


def _weights(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The weights in a run's ``state``, by module."""
    return {MAIN: state["model"], **state.get(MODULES, {})}


def placed_state(
    state: Mapping[str, Any], models: ModelSet, copies: Mapping[Tensor, str]
) -> dict[str, Any]:
    """``state``, as read for this process, on the host and sharded like the run's own state.

    ``copies`` maps tensors that are updated in place of parameters to the parameters' names.
    """
    placed: dict[str, dict[str, Tensor]] = {}
    for module, values in _weights(state).items():
        weights = models.modules[module].state_dict()
        placed[module] = {
            name: placed_like(value, weights[name], is_for_host=True)
            for name, value in values.items()
        }
    moved: dict[str, Tensor] = dict(models.named_parameters())
    moved |= {name: copy for copy, name in copies.items()}
    optimizer = {
        name: placed_values(remembered, moved[name], is_for_host=True)
        for name, remembered in state.get("optimizer", {}).items()
    }
    whole = {**state, "model": placed.pop(MAIN), "optimizer": optimizer}
    return {**whole, MODULES: placed} if placed else whole


def region_needed(models: ModelSet, name: str, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
    """The part of a checkpoint's tensor that this process needs; None: all of it."""
    kind, _, inside = name.partition("/")
    weight = inside if kind in ("model", MODULES) else inside.rpartition("/")[0]
    reference: Tensor | None = models.named_parameters().get(weight)
    if isinstance(reference, DTensor) and tuple(reference.shape) == shape:
        return region_of(reference)
    return None
