"""Adds, prunes and releases experts of a running training.

An added expert is a copy of another one, with its optimizer state. By a *split* the two share that
expert's tokens, and the model computes the same function (``model/experts/splits.py``); a *copy*
competes with its source, so it changes the function at once. A pruned expert leaves an empty slot:
zeros, which no optimizer changes.

What is not named is chosen by a measurement on the last batch (``expert_measures.py``): the busiest
expert is copied, the one with the least salience is pruned. Records name all choices, so a replay
measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ultrathink.config.experts import ExpertGroupConfig
from ultrathink.core.errors import ConfigError
from ultrathink.core.random import step_seed
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.model.experts.splits import leave, release, shares, siblings, split
from ultrathink.training.change import Effect
from ultrathink.training.expert_measures import Measures, measure_experts
from ultrathink.training.expert_rows import ExpertRows, check_expert, experts_in, slots_of
from ultrathink.training.parts import Parts
from ultrathink.training.revival import noisy

_PLANE = 7  # in seeds, in place of a weight's number


class Where(NamedTuple):
    """A group of experts in a layer."""

    row: int  # of the layer, among those with experts
    layer: int
    config: ExpertGroupConfig
    number: int  # of the group, in model.moe.groups
    slots: slice
    experts: MixtureOfExperts

    def __str__(self) -> str:
        return f"group {self.config.name!r} in layer {self.layer}"

    @property
    def num_choices(self) -> int:
        """The number of experts that a token can choose from: the parts of one count as one."""
        router = self.experts.router
        return round(float((router.active * shares(router.branch))[self.slots].sum()))


@dataclass(frozen=True)
class Addition:
    """An expert to add, as a copy of another one of its group."""

    where: Where
    source: int
    expert: int
    offset: float
    """Of the hyperplane that divides the tokens of a split."""


@dataclass(frozen=True)
class Removal:
    """An expert to prune."""

    where: Where
    expert: int
    into: int | None
    """The expert to merge it into, if any."""
    weight: float
    """Its weight in the mean of the two."""


def add_experts(
    run: Parts,
    layer: int | Literal["all"],
    group: str,
    source: int | None,
    how: Literal["split", "copy"],
    applied: Sequence[Mapping[str, Any]],
) -> Effect:
    """Add an expert to ``group`` in a layer or in all; ``applied`` is what a record says of it."""
    places = _places(run, layer, group, "an expert cannot be added")
    measures = None if applied else measure_experts(run)
    additions = [
        _recorded_addition(where, _record_of(where, applied))
        if applied
        else _addition(run, where, source, measures)
        for where in places
    ]
    with torch.no_grad():
        rows = ExpertRows(run.stepper)
        for one in additions:
            _add(rows, one, how, (run.loader.seed, run.progress.step))
    return _finished(run, rows, measures, places, [_plain(one) for one in additions])


def prune_experts(
    run: Parts,
    layer: int | Literal["all"],
    group: str,
    expert: int | None,
    how: Literal["drop", "merge"],
    applied: Sequence[Mapping[str, Any]],
) -> Effect:
    """Prune an expert of ``group`` in a layer or in all; ``applied`` is as in ``add_experts``."""
    places = _places(run, layer, group, "an expert cannot be pruned")
    measures = None if applied else measure_experts(run)
    rows = ExpertRows(run.stepper)
    removals = [
        _recorded_removal(where, _record_of(where, applied))
        if applied
        else _removal(rows, where, expert, how, measures)
        for where in places
    ]
    with torch.no_grad():
        for one in removals:
            _remove(rows, one)
    return _finished(run, rows, measures, places, [_plain(one) for one in removals])


def release_experts(run: Parts, layer: int | Literal["all"], group: str) -> Effect:
    """Let the parts of split experts compete, in a layer or in all that have some."""
    places = _places(run, layer, group, "split experts cannot be released")
    split_ones = [one for one in places if one.experts.router.branch[one.slots].any()]
    if not split_ones:
        raise ConfigError(
            f"split experts of group {group!r} cannot be released: none is split in "
            f"{'any layer' if layer == 'all' else f'layer {layer}'}."
        )
    measures = measure_experts(run)
    for where in split_ones:
        router = where.experts.router
        release(router.side, router.branch, where.slots)
    named = [{"layer": one.layer, "group": group} for one in split_ones]
    return _finished(run, ExpertRows(run.stepper), measures, split_ones, named)


# -- choosing --------------------------------------------------------------------------------------


def _places(run: Parts, layer: int | Literal["all"], group: str, problem: str) -> list[Where]:
    layers = run.model.expert_layers()
    problem = f"{problem} (group {group!r}, layer {layer})"
    found = []
    for one in (list(layers) or [-1]) if layer == "all" else [layer]:
        slots = slots_of(layers, one, group, problem)
        configs = [config for config, _ in layers[one].router.groups()]
        number = [config.name for config in configs].index(group)
        row = list(layers).index(one)
        found.append(Where(row, one, configs[number], number, slots, layers[one]))
    return found


def _addition(run: Parts, where: Where, source: int | None, measures: Measures | None) -> Addition:
    slots, router = where.slots, where.experts.router
    free = (~router.active[slots]).nonzero()[:, 0].tolist()
    if not free:
        size = slots.stop - slots.start
        raise ConfigError(
            f"{where} is full ({size} of {size} slots have an expert): start a new run from this "
            f"one with more slots: training.init_from={run.run.path} and "
            f"model.moe.groups.{where.number}.max_experts={size + 1} or more."
        )
    if source is None:
        if measures is None:
            raise ConfigError(
                f"{where}: the busiest expert is not known before a step; name `source`."
            )
        source = int(measures.tokens[where.row, slots].argmax())
    check_expert(where.experts, slots, source, f"expert {source} of {where} cannot be copied")
    offset, expert = 0.0, int(free[0])
    if measures is not None:
        normal = _normal(run.loader.seed, run.progress.step, where, expert)
        # Of its tokens about half are above the mean of a random projection.
        offset = float(normal @ measures.inputs[where.row, slots.start + source])
    return Addition(where, source, expert, offset)


def _removal(
    rows: ExpertRows,
    where: Where,
    expert: int | None,
    how: Literal["drop", "merge"],
    measures: Measures | None,
) -> Removal:
    slots = where.slots
    if expert is None:
        if measures is None:
            raise ConfigError(
                f"{where}: the least salient expert is not known before a step; name `expert`."
            )
        there = experts_in(where.experts, slots)
        possible = [one for one in there if _enough_without(where, one)] or there
        salience = measures.salience[where.row, slots]
        expert = min(possible, key=lambda one: float(salience[one]))
    problem = f"expert {expert} of {where} cannot be pruned"
    check_expert(where.experts, slots, expert, problem)
    if not _enough_without(where, expert):
        top_k, left = where.config.top_k, where.num_choices - 1
        is_split = where.experts.router.branch[slots].any()
        parts = " (the parts of a split expert are one)" if is_split else ""
        raise ConfigError(
            f"{problem}: a token is sent to top_k = {top_k} experts of the group, and {left} would "
            f"be left to choose from{parts}. For fewer, start a new run from this one with "
            f"model.moe.groups.{where.number}.top_k={left or 1}."
        )
    if how == "drop":
        return Removal(where, expert, None, 0.0)
    into = _most_similar(rows, where, expert)
    weight = 0.5
    if measures is not None:
        mine, other = (float(measures.tokens[where.row, slots][one]) for one in (expert, into))
        weight = mine / (mine + other) if mine + other else 0.5
    return Removal(where, expert, into, weight)


def _enough_without(where: Where, expert: int) -> bool:
    """Whether each token can still be sent to top_k experts; a part's tokens go to its siblings."""
    slot = where.slots.start + expert
    is_part = bool(where.experts.router.branch[slot].any())
    return is_part or where.num_choices > where.config.top_k


def _most_similar(rows: ExpertRows, where: Where, expert: int) -> int:
    """The expert to merge ``expert`` into: a sibling, or that with the most similar router row."""
    first: int = where.slots.start
    related = siblings(where.experts.router.branch, first + expert)
    if related:
        return related[0] - first
    others = [one for one in experts_in(where.experts, where.slots) if one != expert]
    router = rows.weight(rows.names(where.layer)[0])[where.slots].double()
    cosines = torch.nn.functional.cosine_similarity(router[others], router[expert], dim=-1)
    return others[int(cosines.argmax())]


# -- changing --------------------------------------------------------------------------------------


def _add(
    rows: ExpertRows, one: Addition, how: Literal["split", "copy"], seed: tuple[int, int]
) -> None:
    where, router = one.where, one.where.experts.router
    source, slot = where.slots.start + one.source, where.slots.start + one.expert
    for number, name in enumerate(rows.names(where.layer)):
        row = rows.weight(name)[source]
        if how == "copy":
            row = noisy(row, number, step_seed(step_seed(*seed, where.layer), slot, number))
        rows.set_weight(name, slot, row)
        rows.set_moments(name, slot, [value[source] for value in rows.moments(name)])
    router.selection_bias[slot] = router.selection_bias[source]
    router.active[slot] = True
    if how == "split":
        normal = _normal(*seed, where, one.expert).to(router.side)
        plane = torch.cat([normal, normal.new_tensor([one.offset])])
        split(router.side, router.branch, where.slots, (source, slot), plane)


def _normal(seed: int, step: int, where: Where, expert: int) -> Tensor:
    """A random direction ``[C]``, float64, on the CPU: the same in every process."""
    draw = step_seed(step_seed(seed, step, where.layer), where.slots.start + expert, _PLANE)
    size = where.experts.router.weight.shape[1]
    direction = torch.randn(size, generator=torch.Generator().manual_seed(draw)).double()
    unit: Tensor = direction / direction.norm()
    return unit


def _remove(rows: ExpertRows, one: Removal) -> None:
    where, router, first = one.where, one.where.experts.router, one.where.slots.start
    slot = first + one.expert
    for name in rows.names(where.layer):
        if one.into is not None:
            weight = rows.weight(name)
            merged = weight[first + one.into].lerp(weight[slot], one.weight)
            rows.set_weight(name, first + one.into, merged)
        rows.set_weight(name, slot, None)
        rows.set_moments(name, slot, None)
    bias = router.selection_bias
    if one.into is not None:
        bias[first + one.into] = bias[first + one.into].lerp(bias[slot], one.weight)
    bias[slot] = 0.0
    router.active[slot] = False
    leave(router.side, router.branch, slot)


def _finished(
    run: Parts,
    rows: ExpertRows,
    measures: Measures | None,
    places: Sequence[Where],
    named: Sequence[dict[str, Any]],
) -> Effect:
    """End a change: what there was and what there is now, for the record."""
    rows.finish()
    run.model.note_splits()
    again = None if measures is None else measure_experts(run)
    if again is not None and run.boundary.expert_load is not None:
        # For further changes at this boundary.
        load = again.tokens / run.dp_group.size
        run.boundary.expert_load = load.to(run.boundary.expert_load)
    now = [
        {**one, "experts": len(experts_in(where.experts, where.slots))}
        for one, where in zip(named, places, strict=True)
    ]
    before = None if measures is None else {"loss": measures.loss}
    after: dict[str, Any] = {"applied": now}
    return before, after if again is None else {"loss": again.loss, **after}


# -- records ---------------------------------------------------------------------------------------


def _plain(one: Addition | Removal) -> dict[str, Any]:
    named = {"layer": one.where.layer, "group": one.where.config.name, "expert": one.expert}
    if isinstance(one, Addition):
        return {**named, "from": one.source, "offset": one.offset}
    return named if one.into is None else {**named, "into": one.into, "weight": one.weight}


def _record_of(where: Where, applied: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    [record] = [one for one in applied if one["layer"] == where.layer]
    return record


def _recorded_addition(where: Where, record: Mapping[str, Any]) -> Addition:
    return Addition(where, record["from"], record["expert"], record["offset"])


def _recorded_removal(where: Where, record: Mapping[str, Any]) -> Removal:
    return Removal(where, record["expert"], record.get("into"), record.get("weight", 0.0))
