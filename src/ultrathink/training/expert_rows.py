"""The experts of a training model, one by one: their places, weights and optimizer states.

Every weight of a layer of experts has a row for each slot, also where processes have shards of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink.core.errors import ConfigError
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.placement import region_of
from ultrathink.training.stepping import Step


def slots_of(layers: Mapping[int, MixtureOfExperts], layer: int, group: str, problem: str) -> slice:
    """The slots of ``group`` in ``layer``; ConfigError, beginning with ``problem``, if there are
    none."""
    if not layers:
        raise ConfigError(f"{problem}: this model has no experts; model.moe gives it some.")
    if layer not in layers:
        there = ", ".join(map(str, layers))
        raise ConfigError(f"{problem}: the layer has no experts; layers with experts: {there}.")
    groups = {one.name: slots for one, slots in layers[layer].router.groups()}
    if group not in groups:
        raise ConfigError(f"{problem}: there is no such group; groups: {', '.join(groups)}.")
    return groups[group]


def experts_in(layer: MixtureOfExperts, slots: slice) -> list[int]:
    """The experts of a group, counted from its first slot; slots without one are left out."""
    found: list[int] = layer.router.active[slots].nonzero()[:, 0].tolist()
    return found


def check_expert(layer: MixtureOfExperts, slots: slice, expert: int, problem: str) -> None:
    """ConfigError, beginning with ``problem``, unless a group has ``expert``."""
    there = experts_in(layer, slots)
    if expert not in there:
        is_range = there == list(range(there[0], there[-1] + 1))
        has = f"{there[0]} to {there[-1]}" if is_range else ", ".join(map(str, there))
        raise ConfigError(f"{problem}: there is no such expert; the group has {has}.")


def check_same_experts(model: Transformer, state: Mapping[str, Any], step: int) -> None:
    """ConfigError if the snapshot ``state`` of ``step`` has experts in other slots than ``model``.

    Means of their weights would be means of unrelated experts.
    """
    for layer, experts in model.expert_layers().items():
        for name in ("active", "branch"):
            there = state["model"][f"blocks.{layer}.feed_forward.router.{name}"]
            if not torch.equal(there, experts.router.get_buffer(name).to(there.device)):
                raise ConfigError(
                    f"the snapshot of step {step} has other experts in layer {layer} than the run "
                    f"has now, so their weights have no mean; use snapshots taken since."
                )


class ExpertRows:
    """Reads and writes the rows of experts, in weights and optimizer states.

    All processes call the same methods. ``finish`` ends a change.
    """

    def __init__(self, stepper: Step) -> None:
        self._stepper = stepper
        # Detached shards: validation may have left the parameters gathered, and this shards them
        # again.
        self._weights = stepper.objective.model.state_dict()
        parameters = stepper.objective.models.named_parameters()
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        names |= stepper.host_names
        self._moments: dict[str, list[Tensor]] = {}  # of a weight's shape, by its name
        for optimizer in stepper.optimizers:
            for weight, values in optimizer.state.items():
                tensors = [value for value in values.values() if isinstance(value, Tensor)]
                alike = [value for value in tensors if value.shape == weight.shape]
                self._moments[names[weight]] = alike

    def names(self, layer: int) -> list[str]:
        """The weights of a layer that have a row for each slot, the router's first."""
        place = f"blocks.{layer}.feed_forward."
        experts = [name for name in self._weights if name.startswith(f"{place}experts.")]
        return [f"{place}router.weight", *experts]

    def weight(self, name: str) -> Tensor:
        """A copy of a weight, whole."""
        return _whole(self._weights[name])

    def moments(self, name: str) -> list[Tensor]:
        """Copies of the optimizer states of a weight, whole, in a fixed order."""
        return [_whole(value) for value in self._moments.get(name, ())]

    def set_weight(self, name: str, slot: int, row: Tensor | None) -> None:
        """Set the row of ``slot`` in a weight; None: zeros."""
        _write(self._weights[name], slot, row)

    def set_moments(self, name: str, slot: int, rows: list[Tensor] | None) -> None:
        """Set the row of ``slot`` in each optimizer state of a weight; None: zeros."""
        for number, value in enumerate(self._moments.get(name, ())):
            _write(value, slot, None if rows is None else rows[number])

    def finish(self) -> None:
        """Pass the changed weights on to copies of them on the host."""
        if self._stepper.host is not None:
            self._stepper.host.take_weights()


def _whole(tensor: Tensor) -> Tensor:
    """Gathered, as for a forward pass: a row may be on another process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _write(tensor: Tensor, slot: int, row: Tensor | None) -> None:
    """Set ``tensor[slot]``, or this process's part of it."""
    if row is None:
        row = torch.zeros(tensor.shape[1:], dtype=tensor.dtype)
    if not isinstance(tensor, DTensor):
        tensor[slot] = row
        return
    (first, *offset), (count, *size) = region_of(tensor)
    if first <= slot < first + count:
        part = row[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
        tensor.to_local()[slot - first] = part.to(tensor.device)
