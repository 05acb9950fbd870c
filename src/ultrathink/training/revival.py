"""Re-initializes an expert as a copy of the busiest one of its layer and group.

Noisy copies of busy units are used to grow sparse models from dense ones
(https://arxiv.org/abs/2212.05055), and to revive units that never fire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink.core.errors import ConfigError
from ultrathink.core.random import step_seed
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.parallel.placement import region_of
from ultrathink.parallel.world import Group
from ultrathink.training.stepping import Stepper

# Standard deviations of the noise, relative to those of the rows that it is added to, because the
# size of weights differs with layer, width and age of a model. Two equal experts would get equal
# gradients for equal tokens and stay equal; a few per cent of noise separate them and hardly change
# the output of the copy. The choice between the two router rows depends on their difference, which
# is only the noise: however small it is, about half of the tokens go either way.
WEIGHT_NOISE = 0.03
ROUTER_NOISE = 0.1


class Revival(NamedTuple):
    """The slot of an expert in a layer, and the slot of the expert to copy."""

    layer: int
    slot: int
    source: int


class _Place(NamedTuple):
    row: int  # index of the layer among those with experts
    slots: slice  # of the group
    layer: int
    group: str
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of group {self.group!r} in layer {self.layer}"


def revive_experts(
    stepper: Stepper,
    wanted: Sequence[Mapping[str, Any]],
    *,
    load: Tensor | None,
    dp_group: Group,
    seed: tuple[int, int],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Tensor | None]:
    """Re-initialize each expert in ``wanted``, given by ``layer``, ``group`` and ``expert``.

    It becomes a copy of the expert ``from``, by default of the one with most tokens in the last
    step. Each copy is counted with half of its source's tokens, so that not all have the same
    source. Returns the tokens of each in that step, its source, and the ``load`` for further
    revivals at this boundary, as tokens ``[L, E]`` of this process. ``seed`` is that of the run
    and the step. Raises ConfigError, before any change, for an unknown expert. All processes call
    it.
    """
    layers = stepper.objective.model.expert_layers()
    places = [_place(layers, one["layer"], one["group"], one["expert"]) for one in wanted]
    total = None if load is None else dp_group.summed(load).cpu().clone()
    before, after, revivals = [], [], []
    for place, one in zip(places, wanted, strict=True):
        tokens = None if total is None else total[place.row, place.slots]
        source = one["from"] if "from" in one else _busiest(tokens, place)
        named = {"layer": place.layer, "group": place.group, "expert": place.expert}
        had = None if tokens is None else round(tokens[place.expert].item())
        before.append({**named, "tokens": had})
        after.append({**named, "from": source})
        first = place.slots.start
        revivals.append(Revival(place.layer, first + place.expert, first + source))
        if tokens is not None:
            tokens[source] /= 2
            tokens[place.expert] = tokens[source]
    _copy(stepper, revivals, seed)
    if load is not None and total is not None:
        load = (total / dp_group.size).to(load)
    return before, after, load


def _place(layers: Mapping[int, MixtureOfExperts], layer: int, group: str, expert: int) -> _Place:
    what = f"expert {expert} of group {group!r} in layer {layer} cannot be revived"
    if not layers:
        raise ConfigError(f"{what}: this model has no experts; model.moe gives it some.")
    if layer not in layers:
        there = ", ".join(map(str, layers))
        raise ConfigError(f"{what}: the layer has no experts; layers with experts: {there}.")
    router = layers[layer].router
    groups = {one.name: slots for one, slots in router.groups()}
    if group not in groups:
        raise ConfigError(f"{what}: there is no such group; groups: {', '.join(groups)}.")
    slots = groups[group]
    active = [number for number, is_there in enumerate(router.active[slots].tolist()) if is_there]
    if expert not in active:
        raise ConfigError(
            f"{what}: there is no such expert; the group has {active[0]} to {active[-1]}."
        )
    return _Place(list(layers).index(layer), slots, layer, group, expert)


def _busiest(tokens: Tensor | None, place: _Place) -> int:
    """The expert of a group with the most ``tokens`` ``[n]``."""
    if tokens is None or not tokens.max() > 0:
        raise ConfigError(
            f"{place} cannot be revived: no expert of its group had a token in the last step."
        )
    source = int(tokens.argmax())
    if source == place.expert:
        raise ConfigError(f"{place} cannot be revived: it is itself the busiest of its group.")
    return source


@torch.no_grad()
def _copy(stepper: Stepper, revivals: Sequence[Revival], seed: tuple[int, int]) -> None:
    layers = stepper.objective.model.expert_layers()
    # Detached shards: validation may have left the parameters gathered, and this shards them again.
    weights = stepper.objective.model.state_dict()
    parameters = stepper.objective.models.named_parameters()
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    names |= stepper.host_names
    optimizers = stepper.optimizers
    states: dict[str, list[Tensor]] = {}  # optimizer states of a weight's shape, by its name
    for weight, values in ((w, v) for optimizer in optimizers for w, v in optimizer.state.items()):
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        states[names[weight]] = [value for value in tensors if value.shape == weight.shape]
    for layer in dict.fromkeys(one.layer for one in revivals):
        mine = [one for one in revivals if one.layer == layer]
        for one in mine:
            bias = layers[layer].router.selection_bias
            bias[one.slot] = bias[one.source]
        inside = [("router.weight", ROUTER_NOISE)]
        inside += [(f"experts.{name}", WEIGHT_NOISE) for name in layers[layer].experts.state_dict()]
        for number, (part, share) in enumerate(inside):
            name = f"blocks.{layer}.feed_forward.{part}"
            weight = weights[name]
            # Gathered, as for a forward pass: the source may be on another process.
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            for one in mine:
                row = whole[one.source].clone()
                draw = step_seed(*seed, layer)
                noise = _noise(row, step_seed(draw, one.slot, number))
                whole[one.slot] = row + noise * (share * row.std())
                _write(weight, one.slot, whole[one.slot])
                for value in states.get(name, ()):
                    _write(value, one.slot, torch.zeros_like(row))
    if stepper.host is not None:
        stepper.host.take_weights()


def _noise(like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers, the same on every process and device."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=draw).to(like)


def _write(tensor: Tensor, slot: int, row: Tensor) -> None:
    """Set ``tensor[slot]``, or this process's part of it."""
    if not isinstance(tensor, DTensor):
        tensor[slot] = row
        return
    (first, *offset), (count, *size) = region_of(tensor)
    if first <= slot < first + count:
        part = row[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
        tensor.to_local()[slot - first] = part.to(tensor.device)
