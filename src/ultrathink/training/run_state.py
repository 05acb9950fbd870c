"""All that a run remembers, gathered from a trainer and given back to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink.core.protocols import State, Stateful
from ultrathink.core.random import random_state, set_random_state
from ultrathink.parallel.placement import placed_like, region_of
from ultrathink.training.budget import Budget
from ultrathink.training.optimizers import (
    load_optimizer_state,
    optimizer_state,
    placed_values,
    set_option,
)
from ultrathink.training.states import load_states, states_of

if TYPE_CHECKING:
    from ultrathink.training.trainer import Trainer


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    num_skipped: int = 0
    best: float | None = None  # the best validation figure so far
    last_validation: int = 0  # step
    last_checkpoint: int = 0  # step
    last_checkpoint_s: float = 0.0  # elapsed time


def run_state(trainer: Trainer) -> State:
    """What ``Trainer.state_dict`` returns."""
    stepper, budget = trainer.stepper, trainer.budget
    return {
        "model": dict(trainer.model.state_dict()),
        "optimizer": optimizer_state(stepper.optimizers, trainer.model, stepper.host_names),
        "random": random_state(),
        "data": trainer.loader.state_dict(),
        "settings": trainer.settings.state_dict(),
        "progress": asdict(trainer.progress),
        "budget": budget.to_dict() if budget is not None else None,
        "callbacks": states_of(trainer.callbacks),
        "controllers": states_of(trainer.controllers),
        "guard": _guard_state(trainer),
        "identity": trainer.identity,
        "config": trainer.config,
    }


def load_run_state(trainer: Trainer, state: State) -> None:
    """Let ``trainer`` go on from what ``run_state`` returned."""
    values: dict[str, Any] = dict(state)
    stepper, weights = trainer.stepper, trainer.model.state_dict()
    trainer.model.load_state_dict(
        {name: placed_like(value, weights[name]) for name, value in values["model"].items()}
    )
    load_optimizer_state(stepper.optimizers, trainer.model, values["optimizer"], stepper.host_names)
    if stepper.host is not None:
        stepper.host.take_weights()
    set_random_state(values["random"])
    trainer.loader.load_state_dict(values["data"])
    for name, (configured, _) in trainer.settings.optimizer_params.items():
        set_option(stepper.optimizers, name, configured)
    trainer.settings.load_state_dict(values["settings"])
    for name, (_, current) in trainer.settings.optimizer_params.items():
        set_option(stepper.optimizers, name, current)
    trainer.model.set_activation_checkpointing(trainer.settings.activation_checkpointing)
    trainer.progress = Progress(**values["progress"])
    if values["budget"] is not None:
        trainer.budget = Budget(**values["budget"])
    load_states(trainer.callbacks, values["callbacks"])
    load_states(trainer.controllers, values["controllers"])
    load_guard_state(trainer, values.get("guard"))  # older checkpoints have none


def return_to(trainer: Trainer, state: State) -> None:
    """Go back to a state of this same process; what spares memory stays as it is by now.

    What memory suffices for is the machine's matter, and not the history's.
    """
    size, recomputed = trainer.settings.micro_batch_size, trainer.settings.activation_checkpointing
    load_run_state(trainer, state)
    trainer.settings.micro_batch_size = min(size, trainer.settings.micro_batch_size)
    trainer.settings.activation_checkpointing = recomputed
    trainer.model.set_activation_checkpointing(recomputed)
    trainer.fit_micro_batch()  # it may be from when there were more processes


def placed_state(trainer: Trainer, state: State) -> State:
    """``state``, as read for this process, on the host and divided as the trainer's own state."""
    values: dict[str, Any] = dict(state)
    weights, stepper = trainer.model.state_dict(), trainer.stepper
    moved: dict[str, Tensor] = dict(trainer.model.named_parameters())
    moved |= {name: copy for copy, name in stepper.host_names.items()}
    return {
        **values,
        "model": {
            name: placed_like(value, weights[name], is_for_host=True)
            for name, value in values["model"].items()
        },
        "optimizer": {
            name: placed_values(remembered, moved[name], is_for_host=True)
            for name, remembered in values["optimizer"].items()
        },
    }


def _guard_state(trainer: Trainer) -> Any:
    guard: object = trainer.stepper.guard
    return guard.state_dict() if isinstance(guard, Stateful) else trainer.guard_state


def load_guard_state(trainer: Trainer, state: Any) -> None:
    """Give the guard of updates its state, now or once it is there."""
    trainer.guard_state = state
    guard: object = trainer.stepper.guard
    if state is not None and isinstance(guard, Stateful):
        guard.load_state_dict(state)


def region_needed(trainer: Trainer, name: str, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
    """Which part of a tensor of a checkpoint this process needs; None: all of it."""
    kind, _, inside = name.partition("/")
    weight = inside if kind == "model" else inside.rpartition("/")[0]
    reference: Tensor | None = dict(trainer.model.named_parameters()).get(weight)
    if isinstance(reference, DTensor) and tuple(reference.shape) == shape:
        return region_of(reference)
    return None
