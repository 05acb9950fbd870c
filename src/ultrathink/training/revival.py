"""Re-initializes an expert as a copy of the busiest one of its layer and group.

Noisy copies of busy units are used to grow sparse models from dense ones
(https://arxiv.org/abs/2212.05055), and to revive units that never fire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultrathink.core.errors import ConfigError
from ultrathink.core.random import step_seed
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.model.experts.splits import leave
from ultrathink.parallel.world import Group
from ultrathink.training.expert_rows import ExpertRows, check_expert, slots_of
from ultrathink.training.stepping import Step

# Standard deviations of the noise, relative to those of the rows that it is added to, because the
# size of weights differs with layer, width and age of a model. Two equal experts would get equal
# gradients for equal tokens and stay equal; a few per cent of noise separate them and hardly change
# the output of the copy. The choice between the two router rows depends on their difference, which
# is only the noise: however small it is, about half of the tokens go either way.
WEIGHT_NOISE = 0.03
ROUTER_NOISE = 0.1


class _Revival(NamedTuple):
    layer: int
    slot: int
    source: int  # the slot to copy


class _Place(NamedTuple):
    row: int  # index of the layer among those with experts
    slots: slice  # of the group
    layer: int
    group: str
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of group {self.group!r} in layer {self.layer}"


def revive_experts(
    stepper: Step,
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
        revivals.append(_Revival(place.layer, first + place.expert, first + source))
        if tokens is not None:
            tokens[source] /= 2
            tokens[place.expert] = tokens[source]
    _copy(stepper, revivals, seed)
    if load is not None and total is not None:
        load = (total / dp_group.size).to(load)
    return before, after, load


def _place(layers: Mapping[int, MixtureOfExperts], layer: int, group: str, expert: int) -> _Place:
    problem = f"expert {expert} of group {group!r} in layer {layer} cannot be revived"
    slots = slots_of(layers, layer, group, problem)
    check_expert(layers[layer], slots, expert, problem)
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
def _copy(stepper: Step, revivals: Sequence[_Revival], seed: tuple[int, int]) -> None:
    layers = stepper.objective.model.expert_layers()
    rows = ExpertRows(stepper)
    for layer in dict.fromkeys(one.layer for one in revivals):
        mine = [one for one in revivals if one.layer == layer]
        for one in mine:
            router = layers[layer].router
            router.selection_bias[one.slot] = router.selection_bias[one.source]
            leave(router.side, router.branch, one.slot)  # what it shared, others have now
        for number, name in enumerate(rows.names(layer)):
            whole = rows.weight(name)
            for one in mine:
                draw = step_seed(step_seed(*seed, layer), one.slot, number)
                whole[one.slot] = noisy(whole[one.source], number, draw)
                rows.set_weight(name, one.slot, whole[one.slot])
                rows.set_moments(name, one.slot, None)
    stepper.objective.model.note_splits()
    rows.finish()


def noisy(row: Tensor, number: int, seed: int) -> Tensor:
    """A copy of an expert's ``row``, with noise, of weight ``number`` in ``ExpertRows.names``."""
    share = WEIGHT_NOISE if number else ROUTER_NOISE
    # The same numbers on every process and device.
    noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(seed))
    return row + noise.to(row) * (share * row.std())
